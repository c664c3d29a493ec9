"""A private run, from events to everything that a version is made of.

Whatever leaves this module is computed from the catalogue, the configuration, the clock and noisy sums. In
particular none of: counts of people, events or items; times of events; the log's watermark; losses; measures without
noise; weights chosen on validation events. The journal says what is being done, never what was found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from services.trainer.domain.privacy import ADJACENCY, COUNTS, UNIT, DifferentialPrivacy, GaussianRelease
from services.trainer.pipeline.dataset import EventColumns, Histories, encode_attributes
from services.trainer.pipeline.evaluation import Contestants
from services.trainer.pipeline.gate import (
    ENCODER_LIMIT_MILLISECONDS,
    MIN_TEST_USERS,
    PARITY_LIMIT,
    Check,
    Verdict,
)
from services.trainer.pipeline.plan import Plan
from services.trainer.privacy.accounting import epsilon_of, noise_for
from services.trainer.privacy.card import write_private_card
from services.trainer.privacy.choosing import CHOICE_SHARE, choose_weight
from services.trainer.privacy.contributions import over_catalogue, sum_shares, take_people
from services.trainer.privacy.counts import (
    POPULARITY_WEIGHT,
    SCORING,
    add_noise,
    contestants_of,
    with_likeness,
)
from services.trainer.privacy.measuring import TEST_SHARE, NoisyMeasures, measure, parity_of_sum_encoder
from services.trainer.privacy.randomness import SecureRandom
from shared.bundle.sum_encoder import build_sum_encoder
from shared.errors import Cancelled, FailedPrecondition
from shared.ranking_metrics import Interval

MIN_ITEMS = 5
_HISTORY = 64

Reporter = Callable[..., None]
Charge = Callable[[Sequence[GaussianRelease]], None]


@dataclass(frozen=True, slots=True, eq=False)
class PrivateModel:
    """What `shared.bundle.write_bundle` needs, and the verdict."""

    arrays: dict[str, npt.NDArray[Any]]
    vocabulary: Sequence[str]
    encoder_bytes: bytes
    manifest_fields: dict[str, Any]
    attachments: dict[str, bytes]
    verdict: Verdict


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """What a mechanism gives: the arrays, the encoder, and how it was checked.

    Attributes:
        queries: encodes the people to measure on; None where the query has no weight.
    """

    contestants: Contestants
    encoder_bytes: bytes
    max_history: int
    parity: float
    encoder_milliseconds: float
    hyper_parameters: dict[str, Any]
    queries: Callable[[Histories], npt.NDArray[np.float32]] | None = None


def plan_releases(
    private: DifferentialPrivacy,
) -> tuple[GaussianRelease, GaussianRelease, tuple[GaussianRelease, ...]]:
    """Returns the releases of training and of measuring, and what to charge for both.

    Each may spend all of epsilon, on people of its own, so that (epsilon, delta) holds of both together, and of the
    choice between them, which takes the noise of training. The ledger
    composes more than (epsilon, delta): for counts the two are one and the same release, and one is charged; for
    gradients they differ, both are charged, and measuring takes three times the noise, to cost little.
    """
    measuring = noise_for(private.epsilon, private.delta)
    if private.mechanism == COUNTS:
        return measuring, measuring, (measuring,)
    from services.trainer.privacy.gradients import SAMPLING_RATE, STEPS

    training = noise_for(private.epsilon, private.delta, SAMPLING_RATE, STEPS)
    measuring = GaussianRelease(3 * measuring.noise_multiplier)
    return training, measuring, (training, measuring)


def train_privately(
    events: EventColumns,
    attributes_of: Mapping[str, Sequence[str]],
    private: DifferentialPrivacy,
    plan: Plan,
    *,
    model_name: str,
    report: Reporter,
    charge: Charge,
    should_stop: Callable[[], bool] = lambda: False,
    code_version: str = "",
    as_of: datetime | None = None,
    random: SecureRandom | None = None,
) -> PrivateModel:
    """Charges the budget, then trains, measures, judges and exports, all with noise.

    Args:
        attributes_of: the catalogue: its keys are the items of the model, whatever the log holds.
        charge: writes the releases into the ledger; what it raises ends the run before anything was computed.
        as_of: the moment that the version is of, public; by default now.
        random: for tests that repeat.

    Raises:
        FailedPrecondition: CATALOGUE_NEEDED, PRIVACY_BUDGET_EXHAUSTED, DIVERGED or PARITY_BROKEN.
        Cancelled: `should_stop` said so. The charge stays.
    """

    def check() -> None:
        if should_stop():
            raise Cancelled("CANCELLED", "The run was cancelled.")

    catalogue = sorted(attributes_of)
    if len(catalogue) < MIN_ITEMS:
        raise FailedPrecondition(
            "CATALOGUE_NEEDED",
            f"The catalogue names {len(catalogue)} items; a private run needs at least {MIN_ITEMS}: which items occur "
            "in the log tells of people, so that the model's items must come from the catalogue. Import it into "
            "profile (UpsertItems), then run again.",
            {"items": str(len(catalogue))},
        )
    random = random or SecureRandom()
    training_release, measuring_release, charged = plan_releases(private)
    # From here on something of people is computed; nothing gives this back.
    charge(charged)
    report("PREPARING", f"Epsilon {private.epsilon:g}, delta {private.delta:g} are charged to the budget.")
    histories = over_catalogue(events, plan.cleaning, catalogue)
    part_U = random.uniform(histories.user_count)
    test = take_people(histories, np.flatnonzero(part_U < TEST_SHARE))
    # Gradients have nothing to choose, and learn from those who would.
    choice_share = CHOICE_SHARE if private.mechanism == COUNTS else 0.0
    choosing_U = (part_U >= TEST_SHARE) & (part_U < TEST_SHARE + choice_share)
    choosing = take_people(histories, np.flatnonzero(choosing_U))
    training = take_people(histories, np.flatnonzero(part_U >= TEST_SHARE + choice_share))
    check()
    if private.mechanism == COUNTS:
        report("COUNTING", "Counting what follows what; every pair of the catalogue gets noise.")
        served = serve_counts(
            training, choosing, attributes_of, private, training_release, plan.exclude_seen, random
        )
    else:
        from services.trainer.privacy.gradients import serve_gradients

        report("TRAINING", "Training on clipped gradients; every step gets noise.")
        served = serve_gradients(
            training, attributes_of, private, training_release, random, report, should_stop
        )
    check()
    report("EVALUATING", "Measuring on people whom training never read; every sum gets noise.")
    contestants = served.contestants
    queries = served.queries(test) if served.queries else None
    measured = measure(
        test, queries, contestants, plan.exclude_seen, measuring_release.noise_multiplier, random
    )
    report("EXPORTING", "Writing the card.")
    arrays: dict[str, npt.NDArray[Any]] = {
        "item_vectors": contestants.item_vectors_ID,
        "item_bias": contestants.item_bias_I,
        "popularity": contestants.popularity_I,
        **contestants.companion.to_arrays(),
    }
    if not all(bool(np.isfinite(array).all()) for array in arrays.values()):
        raise FailedPrecondition("DIVERGED", "A weight is no longer a number; lower clip_norm.")
    size_bytes = len(served.encoder_bytes) + sum(array.nbytes for array in arrays.values())
    verdict = judge_privately(measured, served, size_bytes, plan)
    promise = describe_promise(private, training_release)
    simulated = any("simulated=True" in values for values in attributes_of.values())
    card = write_private_card(
        model=model_name, promise=promise, measured=measured, verdict=verdict, item_count=len(catalogue),
        hyper_parameters=served.hyper_parameters, simulated=simulated,
    )  # fmt: skip
    moment = (as_of or datetime.now(UTC)).isoformat()
    manifest_fields = {
        "encoder": {"max_history": served.max_history, "dimension": contestants.item_vectors_ID.shape[1]},
        "scoring": contestants.companion.scoring.to_json(),
        "hyper_parameters": served.hyper_parameters,
        # The moments are the run's own, not of events; the watermark would count transactions.
        "data": {
            "watermark": "",
            "events": 0,
            "users": max(0, round(measured.people / TEST_SHARE)),
            "items": len(catalogue),
            "attributes": 0,
            "first_event_at": moment,
            "last_event_at": moment,
        },
        "metrics": _intervals(measured.served),
        "baselines": {"popularity": _intervals(measured.popularity)},
        "slices": [],
        "evaluation": {
            "users": max(0, round(measured.people)),
            "protocol": ("SIMULATION: " if simulated else "") + PROTOCOL,
            "confidence": 0.95,
            "exclude_seen": plan.exclude_seen,
        },
        "gate": {
            "verdict": verdict.verdict,
            "reasons": [f"{c.name}: {c.reason}" for c in verdict.checks if not c.passed],
            "checks": [{"name": c.name, "passed": c.passed, "reason": c.reason} for c in verdict.checks],
        },
        "training": {"parity": served.parity, "encoder_milliseconds": served.encoder_milliseconds},
        "privacy": promise,
        "code_version": code_version,
    }
    return PrivateModel(
        arrays, catalogue, served.encoder_bytes, manifest_fields, {"card.md": card.encode()}, verdict
    )


PROTOCOL = (
    f"The last event of people whom training never read ({TEST_SHARE:.0%}, by a secret coin each). Every item of the "
    "catalogue competes. Sums carry noise: numbers and intervals are private too"
)


def serve_counts(
    training: Histories,
    choosing: Histories,
    attributes_of: Mapping[str, Sequence[str]],
    private: DifferentialPrivacy,
    release: GaussianRelease,
    exclude_seen: bool,
    random: SecureRandom,
) -> Served:
    """Returns what serves from noisy counts and the catalogue; other people choose, with noise, what likeness weighs."""
    noise = release.noise_multiplier
    counts = add_noise(sum_shares(training, private.clip_norm), noise, random)
    unweighted = contestants_of(counts, encode_attributes(training.item_ids, attributes_of))
    weight = choose_weight(choosing, unweighted, exclude_seen, noise, random)
    contestants = with_likeness(unweighted, weight)
    vectors_ID = contestants.item_vectors_ID
    encoder_bytes = build_sum_encoder(_HISTORY, vectors_ID.shape[1])
    parity, milliseconds = parity_of_sum_encoder(encoder_bytes, vectors_ID, _HISTORY)
    return Served(
        contestants,
        encoder_bytes,
        _HISTORY,
        parity,
        milliseconds,
        {
            "mechanism": COUNTS,
            "clip_norm": private.clip_norm,
            "weight_counts": SCORING.lambda_,
            "weight_popularity": POPULARITY_WEIGHT,
            "weight_similarity": weight,
        },
    )


def describe_promise(private: DifferentialPrivacy, release: GaussianRelease) -> dict[str, Any]:
    """Returns the guarantee as manifest and card hold it; epsilon is what the accountant makes of the noise."""
    epsilon = epsilon_of([release], private.delta)
    return {
        "epsilon": epsilon,
        "delta": private.delta,
        "unit": UNIT,
        "adjacency": ADJACENCY,
        "mechanism": private.mechanism,
        "noise_multiplier": release.noise_multiplier,
        "sampling_rate": release.sampling_rate,
        "steps": release.steps,
        "clip_norm": private.clip_norm,
        "statement": (
            f"({epsilon:.4g}, {private.delta:g})-differential privacy of everything in this version. Unit: one person, "
            "with all that they ever did. Adjacency: add or remove one person. Gaussian noise, accounted by privacy "
            "loss distributions (dp-accounting)."
        ),
    }


def judge_privately(measured: NoisyMeasures, served: Served, size_bytes: int, plan: Plan) -> Verdict:
    """Returns the verdict, from noisy measures alone; nothing is compared with a version in service."""
    lead = measured.lead
    checks = (
        Check(
            "enough_people",
            measured.people >= MIN_TEST_USERS,
            f"measured on about {measured.people:.0f} people; at least {MIN_TEST_USERS} are needed",
        ),
        Check(
            "beats_popularity",
            lead.low > 0,
            f"NDCG@10 leads the private popularity by {lead.value:.4f}, interval [{lead.low:.4f}, {lead.high:.4f}] "
            "with its noise; the lower end must be above 0",
        ),
        Check(
            "parity",
            served.parity <= PARITY_LIMIT,
            f"serving differs from training by {served.parity:.1e}; at most {PARITY_LIMIT:.0e} is allowed",
        ),
        Check(
            "latency",
            served.encoder_milliseconds <= ENCODER_LIMIT_MILLISECONDS,
            f"one encoding takes {served.encoder_milliseconds:.2f} ms; at most {ENCODER_LIMIT_MILLISECONDS:.0f} ms "
            "are allowed",
        ),
        Check(
            "size",
            size_bytes <= plan.max_size_bytes,
            f"{size_bytes / 1e6:.1f} MB; at most {plan.max_size_bytes / 1e6:.0f} MB are allowed",
        ),
    )
    if all(check.passed for check in checks):
        return Verdict("PASSED", checks)
    return Verdict("FORCED" if plan.force else "FAILED", checks)


def _intervals(metrics: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {
        name: {"value": interval.value, "low": interval.low, "high": interval.high}
        for name, interval in metrics.items()
    }
