"""Experiments over gRPC and a real PostgreSQL: created once, reported right, stopped when they do harm."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from shopkeeper.feedback.v1 import event_pb2, experiment_pb2, feedback_service_pb2, metrics_pb2

from services.feedback.converters.experiments import from_create
from services.feedback.domain.clustered import ClusteredSums
from services.feedback.domain.experiments import DEFAULT_EXPECTED_PEOPLE
from services.feedback.domain.metrics import Metric
from services.feedback.domain.sample_ratio import sample_ratio_p_value
from services.feedback.domain.sequential import difference_interval
from services.feedback.storage.experiments import PostgresExperiments
from shared.errors import InvalidInput
from shared.experiments import Split, VariantShare, assign
from tests.feedback.conftest import Shop, event, eventually
from tests.feedback.test_metrics_of_people import DAY, record, shown, survey, token, visit

RUNNING = experiment_pb2.EXPERIMENT_STATE_RUNNING
STOPPED = experiment_pb2.EXPERIMENT_STATE_STOPPED


def an_experiment(experiment_id: str = "ranking", **fields: Any) -> experiment_pb2.Experiment:
    variants = [
        experiment_pb2.Variant(variant_id="control", weight=1, serving_config="popular"),
        experiment_pb2.Variant(variant_id="model", weight=1, serving_config="default"),
    ]
    return experiment_pb2.Experiment(
        experiment_id=experiment_id, **{"placement": "home", "variants": variants, **fields}
    )


def create(shop: Shop, experiment_id: str = "ranking", **fields: Any) -> experiment_pb2.Experiment:
    request = feedback_service_pb2.CreateExperimentRequest(experiment=an_experiment(experiment_id, **fields))
    return shop.stub.CreateExperiment(request, timeout=20)


def stop(shop: Shop, experiment_id: str = "ranking", etag: str = "") -> experiment_pb2.Experiment:
    request = feedback_service_pb2.StopExperimentRequest(experiment_id=experiment_id, etag=etag)
    return shop.stub.StopExperiment(request, timeout=20)


def get(shop: Shop, experiment_id: str = "ranking") -> experiment_pb2.Experiment:
    return shop.stub.GetExperiment(
        feedback_service_pb2.GetExperimentRequest(experiment_id=experiment_id), timeout=20
    )


def report(shop: Shop, experiment_id: str = "ranking") -> experiment_pb2.ExperimentReport:
    request = feedback_service_pb2.GetExperimentReportRequest(experiment_id=experiment_id)
    return shop.stub.GetExperimentReport(request, timeout=20)


def refusal(call: Any, *arguments: Any, **fields: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Returns code, reason and metadata of the error that a call ends with."""
    with pytest.raises(grpc.RpcError) as failure:
        call(*arguments, **fields)
    status = rpc_status.from_call(failure.value)
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in status.details)
    return failure.value.code(), info.reason, dict(info.metadata)


# The record


def test_a_created_experiment_runs_and_is_durable(shop: Shop) -> None:
    created = create(shop, traffic_fraction=0.2, guard_rails=[a_guard_rail()], display_name="Modell ß")
    assert (created.state, created.salt, created.primary_metric) == (
        RUNNING,
        "ranking",
        metrics_pb2.METRIC_CLICK_THROUGH_RATE,
    )
    assert created.expected_user_count == 10_000
    assert get(shop) == created
    assert shop.sql("SELECT placement, state FROM feedback.experiments") == [("home", 1)]


def a_guard_rail(**fields: Any) -> experiment_pb2.GuardRail:
    return experiment_pb2.GuardRail(
        **{"metric": metrics_pb2.METRIC_CONVERSION_RATE, "tolerated_loss": 0.1, **fields}
    )


def test_creating_the_same_again_returns_it_and_another_of_its_name_is_refused(shop: Shop) -> None:
    created = create(shop)
    assert create(shop) == created
    code, reason, metadata = refusal(create, shop, traffic_fraction=0.5)
    assert (code, reason) == (grpc.StatusCode.ALREADY_EXISTS, "EXPERIMENT_ALREADY_EXISTS")
    assert metadata == {"experimentId": "ranking"}


def test_a_shelf_has_one_running_experiment(shop: Shop) -> None:
    create(shop)
    code, reason, metadata = refusal(create, shop, "other")
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "PLACEMENT_TAKEN")
    assert metadata == {"placement": "home", "experimentId": "ranking"}
    create(shop, "elsewhere", placement="cart")
    stop(shop)
    assert create(shop, "other").state == RUNNING


def test_two_who_take_a_shelf_at_once_get_one_experiment(shop: Shop) -> None:
    def take(number: int) -> bool:
        try:
            create(shop, f"experiment-{number}")
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, range(16))) == 1


def test_stopping_says_when_and_why_and_again_changes_nothing(shop: Shop) -> None:
    created = create(shop)
    stopped = stop(shop, etag=created.etag)
    assert (stopped.state, stopped.stop_cause) == (STOPPED, experiment_pb2.STOP_CAUSE_REQUESTED)
    assert stopped.stop_time.ToDatetime() >= created.create_time.ToDatetime()
    assert stopped.etag != created.etag
    assert stop(shop) == stopped == get(shop)


def test_a_stale_etag_stops_nothing(shop: Shop) -> None:
    create(shop)
    assert refusal(stop, shop, etag="7")[:2] == (grpc.StatusCode.ABORTED, "STALE_ETAG")
    assert get(shop).state == RUNNING


def test_an_unknown_experiment_is_not_found(shop: Shop) -> None:
    for call in (get, stop, report):
        code, reason, metadata = refusal(call, shop, "nothing")
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "EXPERIMENT_NOT_FOUND")
        assert metadata == {"experimentId": "nothing"}


def test_listing_goes_page_by_page_newest_first(shop: Shop) -> None:
    for number in range(7):
        create(shop, f"e{number}", placement=f"shelf-{number % 2}")
        stop(shop, f"e{number}")
    create(shop, "e7", placement="shelf-0")

    def pages(**fields: Any) -> list[str]:
        found, page_token = [], ""
        while True:
            request = feedback_service_pb2.ListExperimentsRequest(
                page_size=2, page_token=page_token, **fields
            )
            answer = shop.stub.ListExperiments(request, timeout=20)
            found += [experiment.experiment_id for experiment in answer.experiments]
            page_token = answer.next_page_token
            if not page_token:
                return found

    assert pages() == [f"e{number}" for number in range(7, -1, -1)]
    assert pages(placement="shelf-1") == ["e5", "e3", "e1"]
    assert pages(state=RUNNING) == ["e7"]
    first = shop.stub.ListExperiments(feedback_service_pb2.ListExperimentsRequest(page_size=2), timeout=20)
    other = feedback_service_pb2.ListExperimentsRequest(page_token=first.next_page_token, placement="x")
    assert refusal(shop.stub.ListExperiments, other, timeout=20)[0] is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("experiment.experiment_id", {"experiment_id": "Ä"}),
        ("experiment.placement", {"placement": ""}),
        ("experiment.placement", {"placement": "a\x00"}),
        ("experiment.variants", {"variants": []}),
        ("experiment.traffic_fraction", {"traffic_fraction": 1.5}),
        ("experiment.traffic_fraction", {"traffic_fraction": math.nan}),
        ("experiment.primary_metric", {"primary_metric": metrics_pb2.METRIC_CATALOGUE_COVERAGE}),
        ("experiment.primary_metric", {"primary_metric": 99}),
        ("experiment.guard_rails[1].metric", {"guard_rails": [a_guard_rail(), a_guard_rail()]}),
        ("experiment.guard_rails[0].tolerated_loss", {"guard_rails": [a_guard_rail(tolerated_loss=2)]}),
        ("experiment.expected_user_count", {"expected_user_count": 5}),
        ("experiment.salt", {"salt": "x" * 65}),
    ],
)
def test_what_is_wrong_with_an_experiment_is_named(field: str, fields: dict[str, Any]) -> None:
    request = feedback_service_pb2.CreateExperimentRequest(experiment=an_experiment(**fields))
    with pytest.raises(InvalidInput) as failure:
        from_create(request, datetime.now(UTC))
    assert [violation.field for violation in failure.value.violations] == [field]


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan, 1e-45])
def test_a_variant_without_a_proper_weight_is_refused(weight: float) -> None:
    experiment = an_experiment()
    experiment.variants[1].weight = weight
    request = feedback_service_pb2.CreateExperimentRequest(experiment=experiment)
    with pytest.raises(InvalidInput, match="weight"):
        from_create(request, datetime.now(UTC))


# The report


def test_a_report_before_anything_happened_says_undecided(shop: Shop) -> None:
    create(shop)
    empty = report(shop)
    assert [variant.user_count for variant in empty.variants] == [0, 0]
    assert empty.verdict == experiment_pb2.EXPERIMENT_VERDICT_UNDECIDED
    assert (empty.sample_ratio_p_value, empty.sample_ratio_mismatch) == (1, False)
    assert not empty.variants[1].HasField("primary_difference")
    assert not empty.variants[1].metrics.HasField("click_through_rate")


class Traffic:
    """Events of people whom the split of an experiment assigns, and the naive sums of what they did."""

    def __init__(self, shop: Shop, experiment: experiment_pb2.Experiment, people: int) -> None:
        self._shop = shop
        self.events: list[event_pb2.Event] = []
        self.people: dict[str, list[str]] = defaultdict(list)
        self.clicks: dict[str, int] = defaultdict(int)
        self.impressions: dict[str, int] = defaultdict(int)
        self.revenue: dict[str, float] = defaultdict(float)
        self._rng = random.Random(3)
        split = Split(
            experiment.experiment_id,
            experiment.salt,
            experiment.traffic_fraction,
            [VariantShare(v.variant_id, v.weight, v.serving_config) for v in experiment.variants],
        )
        for number in range(people):
            user_id = f"person {number}"
            assignment = assign(f"{number:016}".encode(), split)
            if assignment is not None:
                self.people[assignment.variant_id].append(user_id)
                self._visits(user_id, assignment.label, {"control": 0.2, "model": 0.6}[assignment.variant_id])

    def _visits(self, user_id: str, label: str, click_rate: float) -> None:
        rng = self._rng
        for _ in range(rng.randint(1, 2)):
            items = rng.sample("abcdefgh", rng.randint(1, 4))
            recommendation = token(self._shop, *items, variant=label)
            now = datetime.now(UTC)
            self.events.append(shown(now, user_id, recommendation, *items, "not recommended"))
            self.impressions[user_id] += len(items)
            for item in items:
                if rng.random() < click_rate:
                    click = event_pb2.RecommendationClick(item_id=item)
                    self.events += [
                        event(user_id, attribution_token=recommendation, recommendation_click=click)
                        for _ in range(rng.randint(1, 2))
                    ]
                    self.clicks[user_id] += 1
            if rng.random() < 0.3:
                price = rng.randint(1, 50)
                line = event_pb2.OrderLine(item_id=items[0], quantity=2, price_micros=price * 1_000_000)
                purchase = event_pb2.Purchase(lines=[line], currency_code="EUR")
                self.events.append(event(user_id, attribution_token=recommendation, purchase=purchase))
                self.revenue[user_id] += 2 * price

    def sums(self, variant_id: str, earned: dict[str, float] | dict[str, int]) -> ClusteredSums:
        users = self.people[variant_id]
        return ClusteredSums.of(
            np.array([float(earned[user]) for user in users]),
            np.array([float(self.impressions[user]) for user in users]),
        )


def test_a_report_agrees_with_a_naive_count_of_people(shop: Shop) -> None:
    traffic = Traffic(shop, create(shop, traffic_fraction=0.8), 400)
    record(shop, traffic.events)
    answer = report(shop)
    counts = [len(traffic.people[variant]) for variant in ("control", "model")]
    assert sum(counts) < 380
    assert [variant.user_count for variant in answer.variants] == counts
    assert answer.sample_ratio_p_value == pytest.approx(sample_ratio_p_value(counts, [1, 1]))
    assert not answer.sample_ratio_mismatch
    expected = difference_interval(
        traffic.sums("model", traffic.clicks),
        traffic.sums("control", traffic.clicks),
        0.05,
        DEFAULT_EXPECTED_PEOPLE,
    )
    assert expected is not None
    difference = answer.variants[1].primary_difference
    assert (difference.value, difference.lower, difference.upper) == pytest.approx(
        (expected.value, expected.lower, expected.upper)
    )
    assert not answer.variants[0].HasField("primary_difference")
    assert (answer.verdict, answer.winning_variant_id) == (
        experiment_pb2.EXPERIMENT_VERDICT_BETTER,
        "model",
    )
    for variant in answer.variants:
        clicks = traffic.sums(variant.variant_id, traffic.clicks)
        assert variant.metrics.variant == f"ranking/{variant.variant_id}"
        assert variant.metrics.click_through_rate.value == pytest.approx(clicks.ratio)


def test_revenue_is_compared_in_the_currency_with_most_orders(shop: Shop) -> None:
    traffic = Traffic(shop, create(shop, primary_metric=metrics_pb2.METRIC_REVENUE_PER_MILLE), 300)
    record(shop, traffic.events)
    somebody = traffic.people["model"][0]
    recommendation = token(shop, "a", variant="ranking/model")
    line = event_pb2.OrderLine(item_id="a", quantity=1, price_micros=10**15)
    purchase = event_pb2.Purchase(lines=[line], currency_code="JPY")
    record(shop, [event(somebody, attribution_token=recommendation, purchase=purchase)])
    answer = report(shop)
    model, control = (traffic.sums(variant, traffic.revenue) for variant in ("model", "control"))
    assert answer.currency_code == "EUR"
    assert model.ratio is not None
    assert control.ratio is not None
    assert answer.variants[1].primary_difference.value == pytest.approx(1000 * (model.ratio - control.ratio))


def test_what_happened_before_or_after_an_experiment_is_not_of_it(shop: Shop) -> None:
    recommendation = token(shop, "a", variant="ranking/model")
    record(shop, [shown(datetime.now(UTC) - DAY, "before", recommendation, "a")])
    create(shop)
    record(shop, [event("during", attribution_token=recommendation, page_view=page_view("a"))])
    stop(shop)
    record(shop, [event("after", attribution_token=recommendation, page_view=page_view("a"))])
    assert [variant.user_count for variant in report(shop).variants] == [0, 1]


def page_view(*items: str) -> event_pb2.PageView:
    return event_pb2.PageView(impressions=[event_pb2.Impression(item_id=item) for item in items])


def test_retention_and_surveys_count_from_a_persons_first_recommendation_on(shop: Shop) -> None:
    create(shop, primary_metric=metrics_pb2.METRIC_RETENTION_7_DAYS, guard_rails=[a_nps_guard_rail()])
    now = datetime.now(UTC)
    shop.sql("UPDATE feedback.experiments SET created_at = %s", now - 20 * DAY)
    labels = {
        "control": token(shop, "a", variant="ranking/control"),
        "model": token(shop, "a", variant="ranking/model"),
    }
    events = []
    for variant, returning, promoting in (("control", 60, 100), ("model", 110, 10)):
        for number in range(120):
            user = f"{variant} {number}"
            events.append(shown(now - 15 * DAY, user, labels[variant], "a"))
            events.append(survey(now - 14.5 * DAY, user, nps=10 if number < promoting else 3))
            if number < returning:
                events.append(visit(now - 12 * DAY, user))
        # Their week is not over.
        events.append(shown(now - 2 * DAY, f"late {variant}", labels[variant], "a"))
        # They answered before they took part.
        events.append(survey(now - 3 * DAY, f"late {variant}", nps=0))
    record(shop, events)
    answer = report(shop)
    assert [variant.user_count for variant in answer.variants] == [121, 121]
    assert answer.variants[1].primary_difference.value == pytest.approx((110 - 60) / 120)
    assert answer.variants[1].broken_guard_rails == [metrics_pb2.METRIC_NPS]
    store = PostgresExperiments(shop.feedback.database)
    control, model = store.observe(store.get("ranking"), datetime.now(UTC)).variants
    assert [variant.sums[Metric.NPS].n for variant in (control, model)] == [120, 120]
    assert control.sums[Metric.NPS].ratio == pytest.approx((100 - 20) / 120 * 100)
    assert control.sums[Metric.RETENTION_28_DAYS].n == 0


def a_nps_guard_rail() -> experiment_pb2.GuardRail:
    return experiment_pb2.GuardRail(metric=metrics_pb2.METRIC_NPS, tolerated_loss=0.1)


# Stopping by itself


def harm(shop: Shop, people: int = 150) -> None:
    """Records people of whom one variant clicks and buys, and the other does neither."""
    control, model = (token(shop, "a", variant=f"ranking/{variant}") for variant in ("control", "model"))
    events = []
    for number in range(people):
        events.append(event(f"c{number}", attribution_token=control, page_view=page_view("a")))
        events.append(event(f"m{number}", attribution_token=model, page_view=page_view("a")))
        purchase = event_pb2.Purchase(lines=[event_pb2.OrderLine(item_id="a")])
        events.append(event(f"c{number}", attribution_token=control, purchase=purchase))
    record(shop, events)


def test_a_broken_guard_rail_stops_the_experiment(shop: Shop) -> None:
    create(shop, guard_rails=[a_guard_rail()])
    assert shop.feedback.experiments.stop_broken() == []
    harm(shop)
    assert report(shop).variants[1].broken_guard_rails == [metrics_pb2.METRIC_CONVERSION_RATE]
    assert [e.experiment_id for e in shop.feedback.experiments.stop_broken()] == ["ranking"]
    stopped = get(shop)
    assert (stopped.state, stopped.stop_cause) == (STOPPED, experiment_pb2.STOP_CAUSE_GUARD_RAIL)
    assert shop.feedback.experiments.stop_broken() == []
    assert report(shop).variants[1].broken_guard_rails == [metrics_pb2.METRIC_CONVERSION_RATE]


def test_the_service_looks_after_its_experiments_by_itself(shop: Shop) -> None:
    create(shop, guard_rails=[a_guard_rail()])
    harm(shop)
    shop.feedback.start()
    eventually(lambda: get(shop).state == STOPPED)


def test_an_experiment_for_reports_only_goes_on(shop: Shop) -> None:
    create(shop, guard_rails=[a_guard_rail()], report_only=True)
    harm(shop)
    assert shop.feedback.experiments.stop_broken() == []
    assert get(shop).state == RUNNING


def test_a_broken_split_is_reported_and_stops_the_experiment(shop: Shop) -> None:
    create(shop)
    control, model = (token(shop, "a", variant=f"ranking/{variant}") for variant in ("control", "model"))
    record(
        shop,
        [event(f"c{n}", attribution_token=control, page_view=page_view("a")) for n in range(200)]
        + [event(f"m{n}", attribution_token=model, page_view=page_view("a")) for n in range(80)],
    )
    answer = report(shop)
    assert answer.sample_ratio_mismatch
    assert answer.sample_ratio_p_value < answer.sample_ratio_sequential_p_value < 0.001
    assert answer.verdict == experiment_pb2.EXPERIMENT_VERDICT_INVALID
    shop.feedback.experiments.stop_broken()
    assert get(shop).stop_cause == experiment_pb2.STOP_CAUSE_SAMPLE_RATIO_MISMATCH
