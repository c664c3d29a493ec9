"""Experiments, to the domain and back."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from shopkeeper.feedback.v1 import experiment_pb2, feedback_service_pb2, metrics_pb2

from services.feedback.converters.metrics import invalid, to_estimate, to_row
from services.feedback.converters.people import to_timestamp
from services.feedback.domain.experiments import (
    DEFAULT_EXPECTED_PEOPLE,
    Experiment,
    GuardRail,
    Judgement,
    Observation,
    State,
)
from services.feedback.domain.metrics import Counts, Dimension, Measurement, Metric
from shared.experiments import VariantShare
from shared.tokens import TokenSigner, pack_page, unpack_page

_EXPERIMENT_ID = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_VARIANT_ID = re.compile(r"[a-z0-9_-]{1,63}")
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f]")
_PAGE = "experiments_page"
MAX_VARIANTS, MAX_GUARD_RAILS = 10, 10
MAX_WEIGHT, MIN_WEIGHT = 1e6, 1e-6
MIN_EXPECTED_PEOPLE, MAX_EXPECTED_PEOPLE = 100, 10**9
DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE = 20, 100


def from_create(request: feedback_service_pb2.CreateExperimentRequest, now: datetime) -> Experiment:
    """Returns the experiment of a request, created now.

    Raises:
        InvalidInput: a field is wrong.
    """
    asked = request.experiment
    if not _EXPERIMENT_ID.fullmatch(asked.experiment_id):
        raise invalid(
            "experiment.experiment_id", "must be 1 to 63 characters of [a-z0-9_-], beginning with a letter."
        )
    traffic_fraction = asked.traffic_fraction or 1.0
    if not 0 < traffic_fraction <= 1:
        raise invalid("experiment.traffic_fraction", "must be in (0, 1].")
    primary = _metric(
        asked.primary_metric or metrics_pb2.METRIC_CLICK_THROUGH_RATE, "experiment.primary_metric"
    )
    expected_people = asked.expected_user_count or DEFAULT_EXPECTED_PEOPLE
    if not MIN_EXPECTED_PEOPLE <= expected_people <= MAX_EXPECTED_PEOPLE:
        raise invalid("experiment.expected_user_count", "must be in [100, 1e9].")
    return Experiment(
        experiment_id=asked.experiment_id,
        placement=_text(asked.placement, "experiment.placement", 64, required=True),
        variants=_variants(asked.variants),
        salt=_text(asked.salt, "experiment.salt", 64) or asked.experiment_id,
        created_at=now,
        display_name=_text(asked.display_name, "experiment.display_name", 256),
        traffic_fraction=traffic_fraction,
        primary_metric=primary,
        guard_rails=_guard_rails(asked.guard_rails),
        expected_people=expected_people,
        report_only=asked.report_only,
    )


def to_experiment(experiment: Experiment) -> experiment_pb2.Experiment:
    """Returns an experiment as the contract has it."""
    return experiment_pb2.Experiment(
        experiment_id=experiment.experiment_id,
        display_name=experiment.display_name,
        placement=experiment.placement,
        variants=[
            experiment_pb2.Variant(
                variant_id=variant.variant_id,
                weight=variant.weight,
                serving_config=variant.serving_config,
            )
            for variant in experiment.variants
        ],
        traffic_fraction=experiment.traffic_fraction,
        primary_metric=int(experiment.primary_metric),  # type: ignore[arg-type]
        guard_rails=[
            experiment_pb2.GuardRail(
                metric=int(guard_rail.metric),  # type: ignore[arg-type]
                tolerated_loss=guard_rail.tolerated_loss,
            )
            for guard_rail in experiment.guard_rails
        ],
        salt=experiment.salt,
        state=int(experiment.state),  # type: ignore[arg-type]
        create_time=to_timestamp(experiment.created_at),
        stop_time=to_timestamp(experiment.stopped_at) if experiment.stopped_at else None,
        stop_cause=int(experiment.stop_cause) if experiment.stop_cause else 0,  # type: ignore[arg-type]
        etag=str(experiment.version),
        report_only=experiment.report_only,
        expected_user_count=experiment.expected_people,
    )


def from_experiment_id(experiment_id: str) -> str:
    """Returns an id of the right form; raises InvalidInput."""
    if not _EXPERIMENT_ID.fullmatch(experiment_id):
        raise invalid("experiment_id", "must be 1 to 63 characters of [a-z0-9_-], beginning with a letter.")
    return experiment_id


def from_etag(etag: str) -> int | None:
    """Returns the version that an etag stands for, None when it is empty; raises InvalidInput."""
    if not etag:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", etag):
        raise invalid("etag", "is not an etag of an experiment; send one back unchanged, or leave it empty.")
    return int(etag)


def from_list(
    request: feedback_service_pb2.ListExperimentsRequest, signer: TokenSigner
) -> tuple[str, State | None, tuple[datetime, str] | None, int]:
    """Returns the shelf, the state, the key after which the page begins, and its size.

    Raises:
        InvalidInput: a field is wrong, or the token belongs to another list.
    """
    placement = _text(request.placement, "placement", 64)
    if request.state not in (0, *State):
        raise invalid("state", "is no state of this contract.")
    state = State(request.state) if request.state else None
    if request.page_size < 0:
        raise invalid("page_size", "must be at least 0.")
    size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    if not request.page_token:
        return placement, state, None, size
    fields = unpack_page(signer.verify(_PAGE, request.page_token, "page_token"))
    if fields[:2] != [placement, str(int(state or 0))]:
        raise invalid("page_token", "belongs to another list; keep placement and state from page to page.")
    return placement, state, (datetime.fromisoformat(fields[2]), fields[3]), size


def to_list(
    request: feedback_service_pb2.ListExperimentsRequest,
    experiments: Sequence[Experiment],
    more: bool,
    signer: TokenSigner,
) -> feedback_service_pb2.ListExperimentsResponse:
    """Returns a page, with the token of the next."""
    response = feedback_service_pb2.ListExperimentsResponse(experiments=map(to_experiment, experiments))
    if more:
        last = experiments[-1]
        fields = (request.placement, str(request.state), last.created_at.isoformat(), last.experiment_id)
        response.next_page_token = signer.sign(_PAGE, pack_page(fields))
    return response


def to_report(
    experiment: Experiment,
    observation: Observation,
    judgement: Judgement,
    measured: Measurement,
    confidence_level: float,
    reported_at: datetime,
) -> experiment_pb2.ExperimentReport:
    """Returns a report as the contract has it."""
    counts_of = {counts.group[Dimension.VARIANT]: counts for counts in measured.groups}
    variants = []
    for index, (variant, label) in enumerate(zip(experiment.variants, experiment.labels, strict=True)):
        counts = counts_of.get(label) or Counts({Dimension.VARIANT: label})
        variants.append(
            experiment_pb2.VariantReport(
                variant_id=variant.variant_id,
                user_count=observation.variants[index].people,
                metrics=to_row(counts, measured.known_items, confidence_level),
                primary_difference=to_estimate(judgement.differences[index]),
                broken_guard_rails=map(int, judgement.broken_guard_rails[index]),  # type: ignore[arg-type]
            )
        )
    winner = judgement.winner
    return experiment_pb2.ExperimentReport(
        experiment=to_experiment(experiment),
        variants=variants,
        sample_ratio_p_value=judgement.sample_ratio_p_value,
        sample_ratio_mismatch=judgement.sample_ratio_mismatch,
        verdict=int(judgement.verdict),  # type: ignore[arg-type]
        winning_variant_id=experiment.variants[winner].variant_id if winner is not None else "",
        report_time=to_timestamp(reported_at),
        sample_ratio_sequential_p_value=judgement.sequential_p_value,
        confidence_level=confidence_level,
        currency_code=observation.currency_code,
    )


def _variants(asked: Sequence[experiment_pb2.Variant]) -> list[VariantShare]:
    if not 2 <= len(asked) <= MAX_VARIANTS:
        raise invalid("experiment.variants", "must be 2 to 10, the control first.")
    variants: list[VariantShare] = []
    for index, variant in enumerate(asked):
        path = f"experiment.variants[{index}]"
        if not _VARIANT_ID.fullmatch(variant.variant_id):
            raise invalid(f"{path}.variant_id", "must be 1 to 63 characters of [a-z0-9_-].")
        if any(variant.variant_id == earlier.variant_id for earlier in variants):
            raise invalid(f"{path}.variant_id", "was named before.")
        if not MIN_WEIGHT <= variant.weight <= MAX_WEIGHT:
            raise invalid(f"{path}.weight", "must be in [1e-6, 1e6].")
        serving_config = _text(variant.serving_config, f"{path}.serving_config", 63, required=True)
        variants.append(VariantShare(variant.variant_id, variant.weight, serving_config))
    return variants


def _guard_rails(asked: Sequence[experiment_pb2.GuardRail]) -> list[GuardRail]:
    if len(asked) > MAX_GUARD_RAILS:
        raise invalid("experiment.guard_rails", "must be at most 10.")
    guard_rails: list[GuardRail] = []
    for index, guard_rail in enumerate(asked):
        path = f"experiment.guard_rails[{index}]"
        metric = _metric(guard_rail.metric, f"{path}.metric")
        if any(metric is earlier.metric for earlier in guard_rails):
            raise invalid(f"{path}.metric", "was named before.")
        loss = guard_rail.tolerated_loss
        if not (math.isfinite(loss) and 0 <= loss <= 1):
            raise invalid(f"{path}.tolerated_loss", "must be in [0, 1].")
        guard_rails.append(GuardRail(metric, loss))
    return guard_rails


def _metric(number: Any, path: str) -> Metric:
    if number not in list(Metric):
        raise invalid(path, "is no metric of this contract.")
    metric = Metric(number)
    if metric is Metric.CATALOGUE_COVERAGE:
        raise invalid(path, "must be a metric of people; the catalogue's coverage is none.")
    return metric


def _text(value: str, path: str, limit: int, *, required: bool = False) -> str:
    if required and not value:
        raise invalid(path, f"is required, 1 to {limit} characters.")
    if len(value) > limit:
        raise invalid(path, f"has more than {limit} characters.")
    if _CONTROL_CHARACTER.search(value):
        raise invalid(path, "holds a control character; remove it.")
    return value
