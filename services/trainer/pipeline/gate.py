"""Whether a version may serve: every check in a sentence with its numbers. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from services.trainer.pipeline.dataset import MIN_USERS
from services.trainer.pipeline.report import Comparison, Report

PARITY_LIMIT = 1e-5
ENCODER_LIMIT_MILLISECONDS = 25.0
MIN_TEST_USERS = MIN_USERS
# A part of the people may lose so much of the incumbent's NDCG@10, or what chance explains.
SLICE_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its name, whether it passed, and the finding."""

    name: str
    passed: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """PASSED, FAILED, or FORCED (failed, and told to promote all the same), with every check."""

    verdict: str
    checks: tuple[Check, ...]

    @property
    def may_serve(self) -> bool:
        """Whether an alias may be pointed at the version."""
        return self.verdict != "FAILED"


def judge(
    report: Report,
    *,
    weights_finite: bool,
    parity: float,
    encoder_milliseconds: float,
    size_bytes: int,
    max_size_bytes: int,
    force: bool,
    comparison: Comparison | None = None,
) -> Verdict:
    """Returns the verdict.

    Args:
        parity: largest difference of a query vector between training and serving, relative to its size.
        encoder_milliseconds: median time of one encoding with the serving runtime.
        size_bytes: of arrays and encoder.
        force: promote whatever is found.
        comparison: with the version in service; None where there is none to beat.
    """
    lead = report.lead_over_popularity
    checks = [
        Check(
            "enough_people",
            report.user_count >= MIN_TEST_USERS,
            f"measured on {report.user_count} people; at least {MIN_TEST_USERS} are needed",
        ),
        Check(
            "beats_popularity",
            lead.low > 0,
            f"NDCG@10 leads the better popularity by {lead.value:.4f}, interval [{lead.low:.4f}, {lead.high:.4f}]; "
            "its lower end must be above 0",
        ),
        Check("finite_weights", weights_finite, "every weight must be a finite number"),
        Check(
            "parity",
            parity <= PARITY_LIMIT,
            f"serving differs from training by {parity:.1e}; at most {PARITY_LIMIT:.0e} is allowed",
        ),
        Check(
            "latency",
            encoder_milliseconds <= ENCODER_LIMIT_MILLISECONDS,
            f"one encoding takes {encoder_milliseconds:.2f} ms; at most {ENCODER_LIMIT_MILLISECONDS:.0f} ms are allowed",
        ),
        Check(
            "size",
            size_bytes <= max_size_bytes,
            f"{size_bytes / 1e6:.1f} MB; at most {max_size_bytes / 1e6:.0f} MB are allowed",
        ),
        *_against_incumbent(comparison),
    ]
    if all(check.passed for check in checks):
        return Verdict("PASSED", tuple(checks))
    return Verdict("FORCED" if force else "FAILED", tuple(checks))


def _against_incumbent(comparison: Comparison | None) -> list[Check]:
    if comparison is None:
        return []
    if comparison.why_none:
        finding = (
            f"the version in service, {comparison.version}, cannot be compared with: {comparison.why_none}"
        )
        return [Check("beats_incumbent", False, finding)]
    lead = comparison.lead
    how = (
        f"on {comparison.user_count} people whose events are newer than it"
        if comparison.same_people
        else "by what each was measured at, because too few held-out events are newer than it"
    )
    checks = [
        Check(
            "beats_incumbent",
            lead.low > 0,
            f"NDCG@10 leads the version in service, {comparison.version}, by {lead.value:.4f}, interval "
            f"[{lead.low:.4f}, {lead.high:.4f}], {how}; its lower end must be above 0",
        )
    ]
    for part in comparison.slices:
        found, old = part.lead_over_incumbent, part.incumbent_metrics
        if found is None or old is None:
            continue
        allowed = SLICE_TOLERANCE * old["ndcg@10"].value
        worse = found.high < 0 and -found.value > allowed
        checks.append(
            Check(
                "slice_no_worse",
                not worse,
                f"{part.name}: NDCG@10 differs from the version in service by {found.value:+.4f}, interval "
                f"[{found.low:.4f}, {found.high:.4f}], for {part.user_count} people"
                f"{'' if comparison.same_people else ', by what each was measured at'}; it may lose {allowed:.4f}",
            )
        )
    return checks
