"""Whether a version may serve: every check in a sentence with its numbers. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from services.trainer.pipeline.dataset import MIN_USERS
from services.trainer.pipeline.evaluation import Report

PARITY_LIMIT = 1e-5
ENCODER_LIMIT_MILLISECONDS = 25.0
MIN_TEST_USERS = MIN_USERS


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
) -> Verdict:
    """Returns the verdict.

    Args:
        parity: largest difference of a query vector between training and serving, relative to its size.
        encoder_milliseconds: median time of one encoding with the serving runtime.
        size_bytes: of arrays and encoder.
        force: promote whatever is found.
    """
    lead = report.lead_over_popularity
    checks = (
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
    )
    if all(check.passed for check in checks):
        return Verdict("PASSED", checks)
    return Verdict("FORCED" if force else "FAILED", checks)
