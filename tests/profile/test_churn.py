"""Who is about to leave: the mathematics beside slow twins, then a service over a real log and a socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image
from shopkeeper.profile.v1 import profile_service_pb2 as pb
from shopkeeper.profile.v1 import profile_service_pb2_grpc, user_portrait_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2, recommend_service_pb2_grpc, recommendation_pb2

from services.profile.__main__ import Profile, train_and_publish
from services.profile.clients.breaker import BREAKER_SECONDS
from services.profile.clients.suggestions import RecommendSuggestions
from services.profile.converters.churn import draw_items
from services.profile.domain.boosted_trees import BoostedTrees, BoostingParameters
from services.profile.domain.churn_features import COLUMN, DAY_US, churn_examples
from services.profile.domain.churn_model import ChurnKind, Trainer, fit_reference, objections
from services.profile.domain.classification_quality import Quality, auc, log_loss
from services.profile.domain.logistic_regression import LogisticRegression
from services.profile.domain.purchase_counts import BgNbd
from services.profile.domain.purchase_log import PurchaseLog
from services.profile.domain.reliability_diagram import BLUE, ORANGE
from services.profile.domain.win_back import MIN_SIMILAR
from services.profile.settings import ProfileSettings
from services.profile.storage.churn_registry import ChurnModels
from shared import grpc_status
from shared.event_kinds import EventKind
from shared.identity import UserKey
from shared.keys import read_signing_key, read_verifying_key
from tests.profile.conftest import Log, eventually

REFERENCE = BgNbd(0.5, 20.0, 0.8, 2.5)


def purchases(rows: list[tuple[int, float, int, float, bool]], users: int = 0) -> PurchaseLog:
    """Returns the log of (shopper, day, item, amount, returned); a shopper's lines of one time are one order."""
    user, day, item, amount, returned = (list(column) for column in zip(*rows, strict=True))
    keys = {key: number for number, key in enumerate(dict.fromkeys(zip(user, day, returned, strict=True)))}
    return PurchaseLog(
        np.array(user, np.int64),
        (np.array(day) * DAY_US).astype(np.int64),
        np.array([keys[key] for key in zip(user, day, returned, strict=True)], np.int64),
        np.array(item, np.int64),
        np.array(amount, np.float64),
        np.ones(len(rows)),
        np.array(returned),
        users or max(user) + 1,
    )


def shoppers(seed: int, users: int = 900, days: int = 360) -> PurchaseLog:
    """Simulates shoppers of steady rhythm, some of whom leave after their orders have become small."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, float, int, float, bool]] = []
    for user in range(users):
        gap, time = rng.uniform(8, 50), rng.uniform(0, 120)
        leaves = rng.uniform(60, 500)
        while time < min(days, leaves):
            worth = 5.0 if leaves - time < gap else 40.0
            rows += [(user, time, int(rng.integers(40)), worth * rng.uniform(0.8, 1.2), False)]
            time += gap * rng.uniform(0.7, 1.3)
    return purchases(rows, users)


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(1)
    label, score = rng.random(60) < 0.4, rng.integers(0, 8, 60) / 8.0
    pairs = [(a, b) for a in score[label] for b in score[~label]]
    by_hand = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert auc(label, score) == pytest.approx(by_hand)


def test_a_calibrated_forecast_has_no_calibration_error_and_an_overconfident_one_has() -> None:
    rng = np.random.default_rng(2)
    truth = rng.uniform(0, 1, 40_000)
    label = rng.random(40_000) < truth
    good, bad = Quality.of(label, truth), Quality.of(label, np.clip(3 * truth - 1, 0.001, 0.999))
    assert good.expected_calibration_error < 0.01 < 0.1 < bad.expected_calibration_error
    assert good.log_loss < bad.log_loss
    assert sum(b.count for b in good.reliability) == 40_000
    assert log_loss(np.array([True]), np.array([0.25])) == pytest.approx(np.log(4))


def test_boosted_trees_learn_what_no_line_can_and_credit_it_to_its_features() -> None:
    rng = np.random.default_rng(3)
    x_KF = rng.normal(size=(3000, 5))
    label = (x_KF[:, 0] * x_KF[:, 2] > 0).astype(np.float64)
    parameters = BoostingParameters(trees=80, learning_rate=0.2, feature_share=1.0)
    trees = BoostedTrees.fit(x_KF[:2000], label[:2000], np.ones(2000), parameters, rng)
    line = LogisticRegression.fit(x_KF[:2000], label[:2000], np.ones(2000), 1.0)
    held_out, truth = x_KF[2000:], label[2000:] > 0
    assert auc(truth, trees.log_odds(held_out)) > 0.95
    assert auc(truth, line.log_odds(held_out)) < 0.6
    credit_KF = trees.contributions(held_out)
    usual = trees.bias + trees.leaf_ML.mean(axis=1).sum()
    assert credit_KF.sum(axis=1) + usual == pytest.approx(trees.log_odds(held_out))
    assert set(np.abs(credit_KF).mean(axis=0).argsort()[-2:].tolist()) == {0, 2}


def test_the_slow_twin_of_a_tree_gives_the_same_log_odds() -> None:
    rng = np.random.default_rng(4)
    x_KF = rng.normal(size=(500, 4))
    label = (x_KF[:, 1] > 0.3).astype(np.float64)
    trees = BoostedTrees.fit(x_KF, label, np.ones(500), BoostingParameters(trees=10), rng)
    for row in range(20):
        total = trees.bias
        for features, thresholds, leaves in zip(
            trees.feature_MV, trees.threshold_MV, trees.leaf_ML, strict=True
        ):
            node = 0
            while node < len(features):
                node = 2 * node + 1 + int(x_KF[row, features[node]] > thresholds[node])
            total += leaves[node - len(features)]
        assert float(trees.log_odds(x_KF[row : row + 1])[0]) == pytest.approx(total)


def test_features_of_a_shopper_worked_by_hand() -> None:
    log = purchases(
        [
            (0, 10.0, 1, 20.0, False),
            (0, 10.0, 2, 10.0, False),
            (0, 40.0, 1, 10.0, False),
            (0, 45.0, 1, 10.0, True),
            (1, 50.0, 3, 7.0, False),
            (2, 95.0, 3, 7.0, False),
        ]
    )
    examples = churn_examples(log, int(90 * DAY_US), 30.0, REFERENCE)
    assert examples.user_K.tolist() == [0, 1]

    def feature(name: str, row: int = 0) -> float:
        return float(examples.feature_KF[row, COLUMN[name]])

    assert (feature("recency_days"), feature("tenure_days"), feature("active_days")) == (50, 80, 30)
    # One gap of 30 days; the population's mean, 30 too, counts twice.
    assert feature("mean_gap_days") == pytest.approx(30.0)
    assert feature("overdue_ratio") == pytest.approx(50 / 30)
    assert (feature("orders"), feature("orders_60"), feature("amount")) == (2, 1, 40)
    assert feature("last_amount_ratio") == pytest.approx(10 / 20)
    assert (feature("distinct_items"), feature("lines_per_order")) == (2, 1.5)
    assert feature("returned_share") == pytest.approx(1 / 9)
    assert feature("days_since_return") == 45
    assert feature("decayed_orders_45") == pytest.approx(0.5 ** (80 / 45) + 0.5 ** (50 / 45))
    assert (feature("recency_days", 1), feature("last_amount_ratio", 1)) == (40, 1)


def test_features_of_a_day_do_not_change_by_what_comes_after_it() -> None:
    log = shoppers(5, users=80)
    now_us = 200 * DAY_US
    then = churn_examples(log.before(now_us), now_us, 60.0, REFERENCE)
    later = churn_examples(log, now_us, 60.0, REFERENCE)
    assert np.array_equal(then.feature_KF, later.feature_KF)
    assert np.isfinite(then.feature_KF).all()


def test_a_model_that_sees_more_than_rhythm_takes_the_place_of_the_reference() -> None:
    model = Trainer(shoppers(6, users=700), 60, origins=4).train(360 * DAY_US)
    assert model.quality is not None
    assert model.reference_quality is not None
    assert model.kind is ChurnKind.BOOSTED_TREES
    assert model.quality.auc > model.reference_quality.auc
    assert model.quality.log_loss < model.reference_quality.log_loss


def test_a_model_that_does_not_beat_the_reference_on_both_counts_is_refused() -> None:
    good, bad = Quality(0.8, 0.5, 0.02, ()), Quality(0.75, 0.6, 0.02, ())
    assert not objections(good, bad)
    assert len(objections(bad, good)) == 2
    assert objections(Quality(0.9, 0.55, 0.02, ()), good)
    assert objections(Quality(0.9, 0.4, 0.2, ()), good)


def test_too_young_a_shop_is_served_by_the_reference() -> None:
    model = Trainer(shoppers(7, users=60, days=40), 90).train(40 * DAY_US)
    assert (model.kind, model.quality, model.ensemble) == (ChurnKind.BG_NBD, None, None)


@pytest.fixture(scope="module")
def online_retail(test_data: Path) -> PurchaseLog:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = test_data / "online_retail" / "events.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    table = pq.read_table(path)
    fee = pc.match_substring_regex(
        table["stock_code"], r"^(POST|DOT|M|m|D|S|B|C[23]|PADS|CRUK|BANK CHARGES|AMAZONFEE)$|^gift_"
    )
    keep = pc.and_(pc.and_(pc.is_valid(table["customer_id"]), pc.greater(table["price"], 0)), pc.invert(fee))
    table = table.filter(keep)
    ids, user = np.unique(table["customer_id"].to_numpy(), return_inverse=True)
    quantity = table["quantity"].to_numpy().astype(np.float64)
    codes = [
        pc.dictionary_encode(table[name].combine_chunks()).indices.to_numpy().astype(np.int64)
        for name in ("invoice", "stock_code")
    ]
    time_us = table["ts"].cast(pa.timestamp("us")).cast(pa.int64()).to_numpy()
    amount = np.abs(quantity) * table["price"].to_numpy().astype(np.float64)
    return PurchaseLog(
        user.astype(np.int64), time_us, codes[0], codes[1], amount, np.abs(quantity), quantity < 0, len(ids)
    )


# On the last of these the Christmas trade begins: many more buy again than the days before let expect.
@pytest.mark.parametrize(
    ("horizon_days", "day", "least_auc"),
    [
        (60, datetime(2011, 7, 12, tzinfo=UTC), 0.77),
        (90, datetime(2011, 7, 12, tzinfo=UTC), 0.77),
        (90, datetime(2011, 9, 10, 12, tzinfo=UTC), 0.745),
    ],
)
def test_on_a_real_shop_the_model_beats_the_reference_on_days_it_has_not_seen(
    online_retail: PurchaseLog, horizon_days: int, day: datetime, least_auc: float
) -> None:
    quality, reference = Trainer(online_retail, horizon_days).evaluate(int(day.timestamp() * 1e6))
    assert quality is not None
    assert reference is not None
    assert quality.auc >= max(least_auc, reference.auc + 0.01)
    assert quality.log_loss < reference.log_loss
    assert not objections(quality, reference)


def test_how_many_leave_comes_from_the_reference_and_who_from_the_ensemble() -> None:
    log = shoppers(6, users=700)
    trainer = Trainer(log, 60, origins=4)
    ensemble = trainer.fit(300 * DAY_US)
    assert ensemble is not None
    reference = fit_reference(log, 300 * DAY_US)
    examples = churn_examples(log, 300 * DAY_US, 60.0, reference)
    probability = ensemble.probabilities(examples.feature_KF)
    silent = reference.no_purchase_probabilities(examples.counts, 60.0)
    bias, own, weight = ensemble.calibration
    features = examples.feature_KF
    score = bias + own * ensemble.raw_log_odds(features) + weight * features[:, COLUMN["reference_log_odds"]]
    # These shoppers are so easily told apart that the reference is the one who is wrong: no further than a season.
    shift = np.median(np.log(probability) - np.log1p(-probability) - score)
    assert shift == pytest.approx(-np.log(2.0), abs=1e-6)
    assert probability.mean() > silent.mean()
    # Where they are harder to tell apart, the levels are the same.
    vague = replace(ensemble, calibration=(bias, own / 20, weight / 20))
    assert vague.probabilities(features).mean() == pytest.approx(silent.mean(), abs=1e-6)
    assert np.array_equal(np.argsort(score, kind="stable"), np.argsort(probability, kind="stable"))
    assert len(ensemble.probabilities(features[:0])) == 0


class _Recommend(recommend_service_pb2_grpc.RecommendServiceServicer):
    """Recommends what it is told to, or fails."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.broken = False

    def Recommend(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.asked.append(request.user_key)
        if self.broken:
            context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        items = [recommendation_pb2.RecommendedItem(item_id=f"item{n}") for n in range(request.page_size)]
        return recommend_service_pb2.RecommendResponse(items=items)


def test_items_to_win_somebody_back_are_drawn_from_recommend_and_done_without_when_it_is_away() -> None:
    fake = _Recommend()
    server = grpc.server(ThreadPoolExecutor(2))
    recommend_service_pb2_grpc.add_RecommendServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    now = [100.0]
    keys = [UserKey(bytes([n]) * 16) for n in range(3)]
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            suggestions = RecommendSuggestions(channel, lambda: now[0])
            assert suggestions.items(keys, 2) == [["item0", "item1"]] * 3
            assert fake.asked == keys
            fake.broken = True
            assert suggestions.items(keys, 2) == [[], [], []]
            # Asked once: nobody waits for it again so soon.
            assert len(fake.asked) == 4
            fake.broken = False
            assert suggestions.items(keys[:1], 1) == [[]]
            now[0] += BREAKER_SECONDS + 1
            assert suggestions.items(keys[:1], 1) == [["item0"]]
    finally:
        server.stop(0)
    risk = user_portrait_pb2.ChurnRisk(
        suggested_actions=[
            user_portrait_pb2.WinBackAction(kind=user_portrait_pb2.WIN_BACK_ACTION_KIND_SERVICE_CALL),
            user_portrait_pb2.WinBackAction(kind=user_portrait_pb2.WIN_BACK_ACTION_KIND_RECOMMEND_ITEMS),
        ]
    )
    draw_items(risk, ["tea"])
    assert [list(action.item_ids) for action in risk.suggested_actions] == [[], ["tea"]]


class ChurnShop:
    """A service whose log holds a year of shoppers; the newest events are of yesterday."""

    def __init__(self, service: Profile, channel: Any, log: Log, settings: ProfileSettings) -> None:
        self.service, self.log, self.settings = service, log, settings
        self.stub = profile_service_pb2_grpc.ProfileServiceStub(channel)

    def score(self) -> None:
        self.service.churn.score_now()


def fill(log: Log, seed: int = 8, users: int = 420) -> datetime:
    """Writes simulated shoppers into the log; returns the day that they begin with."""
    begin = datetime.now(UTC) - timedelta(days=361)
    history = shoppers(seed, users=users)
    with log.connection.transaction():
        for user, time_us, item, amount in zip(
            history.user_N.tolist(),
            history.time_us_N.tolist(),
            history.item_N.tolist(),
            history.amount_N.tolist(),
            strict=True,
        ):
            at = begin + timedelta(microseconds=time_us)
            lines = [(f"item{item}", 1.0, round(amount * 1e6))]
            log.record(f"user{user}", EventKind.PURCHASE, at=at, lines=lines)
    return begin


@pytest.fixture
def churn_shop(
    log: Log,
    start_profile: Callable[..., tuple[Profile, Any]],
    tmp_path: Path,
    keys_dir: Path,
    database_url: str,
) -> ChurnShop:
    registry = tmp_path / "registry"
    settings = ProfileSettings(
        listen="127.0.0.1:0", keys=keys_dir, registry=registry, database_url=database_url, log_level="error"
    )
    service, channel = start_profile(registry=registry, churn_score_seconds=3600.0)
    eventually(lambda: service.readiness()[0], "readiness")
    return ChurnShop(service, channel, log, settings)


def reason_of(call: Callable[[], Any]) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return grpc_status.from_rpc_error(caught.value).reason


def test_without_a_model_every_question_of_risk_says_what_to_do(churn_shop: ChurnShop) -> None:
    stub = churn_shop.stub
    assert reason_of(lambda: stub.GetChurnModel(pb.GetChurnModelRequest())) == "NO_CHURN_MODEL"
    assert reason_of(lambda: stub.ListAtRiskUsers(pb.ListAtRiskUsersRequest())) == "NO_CHURN_MODEL"
    assert reason_of(lambda: list(stub.WatchChurnAlerts(pb.WatchChurnAlertsRequest()))) == "NO_CHURN_MODEL"
    with pytest.raises(Exception, match="no purchase"):
        train_and_publish(churn_shop.settings, 60)


def test_a_trained_model_lists_shoppers_and_tells_when_one_crosses_the_threshold(
    churn_shop: ChurnShop, capsys: pytest.CaptureFixture[str]
) -> None:
    shop, stub = churn_shop, churn_shop.stub
    fill(shop.log)
    version = train_and_publish(shop.settings, 60)
    assert version in capsys.readouterr().out
    shop.score()

    model = stub.GetChurnModel(pb.GetChurnModelRequest())
    assert (model.model_version, model.horizon_days) == (version, 60)
    assert model.quality.auc > 0.5
    assert len(model.quality.reliability) == 10
    assert reason_of(lambda: stub.GetChurnModel(pb.GetChurnModelRequest(horizon_days=30))) == "NO_CHURN_MODEL"

    # Pages hold everybody once, by falling probability.
    risks, token = [], ""
    while True:
        page = stub.ListAtRiskUsers(
            pb.ListAtRiskUsersRequest(min_probability=0.0, page_size=150, page_token=token)
        )
        risks += page.risks
        token = page.next_page_token
        if not token:
            break
    probabilities = [risk.no_purchase_probability.value for risk in risks]
    assert len({risk.user_key for risk in risks}) == len(risks) > 150
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(0 <= p <= 1 for p in probabilities)
    assert all(risk.lifetime_value_micros >= 0 and risk.currency_code == "EUR" for risk in risks)
    reasons = [reason for risk in risks[:100] for reason in risk.reasons]
    overdue = [r for r in reasons if r.signal == 1]
    assert overdue
    assert all(r.current_value > r.usual_value and r.contribution > 0 for r in overdue)
    other = pb.ListAtRiskUsersRequest(min_probability=0.9, page_size=150, page_token=page.next_page_token)
    first = stub.ListAtRiskUsers(pb.ListAtRiskUsersRequest(min_probability=0.0, page_size=1))
    other.page_token = first.next_page_token
    assert reason_of(lambda: stub.ListAtRiskUsers(other)) == "INVALID_TOKEN"

    # What usually wins such shoppers back is counted on earlier moments of the same log.
    known = [
        action for risk in risks for action in risk.suggested_actions if action.success_rate.evidence_count
    ]
    assert known
    for action in known:
        assert action.success_rate.evidence_count >= MIN_SIMILAR
        assert action.success_rate.value == action.success_count / action.success_rate.evidence_count
        assert 0 <= action.success_rate_low <= action.success_rate.value <= action.success_rate_high <= 1
    for risk in risks:
        rates = [action.success_rate.value for action in risk.suggested_actions]
        assert rates == sorted(rates, reverse=True)

    # The portrait says the same.
    portrait = stub.GetProfile(pb.GetProfileRequest(user_key=risks[0].user_key)).portrait
    assert portrait.churn_risk == risks[0]

    # Somebody comes back, and then stays away again (their purchase is taken out of the log).
    key = risks[0].user_key
    user_id = next(f"user{n}" for n in range(420) if shop.log.key(f"user{n}") == key)
    alerts: list[Any] = []
    stream = stub.WatchChurnAlerts(pb.WatchChurnAlertsRequest(threshold=0.5))

    def listen() -> None:
        try:
            alerts.extend([next(stream)])
        except grpc.RpcError:
            return

    for day in (9, 6, 3):
        shop.log.record(
            user_id,
            EventKind.PURCHASE,
            at=datetime.now(UTC) - timedelta(days=day),
            lines=[("back", 1.0, 80_000_000)],
        )
    shop.score()
    lower = stub.GetProfile(pb.GetProfileRequest(user_key=key)).portrait.churn_risk
    assert lower.no_purchase_probability.value < 0.5
    thread = threading.Thread(target=listen)
    thread.start()
    eventually(lambda: shop.service.churn._streams == 1, "the stream")
    shop.log.connection.execute("DELETE FROM feedback.events WHERE line_items = ARRAY['back']")
    shop.score()
    thread.join(20.0)
    stream.cancel()
    assert len(alerts) == 1
    alert = alerts[0]
    assert alert.risk.user_key == key
    assert alert.previous_probability < 0.5 <= alert.risk.no_purchase_probability.value
    # It is told once; who resumes before it is told again.
    shop.score()
    assert shop.service.churn._alerts.after(0, 60, 0.5, 100)[1][0].user_key == key
    assert len(shop.service.churn._alerts.after(0, 60, 0.5, 100)[1]) == 1

    # Erasure reaches scores, alerts, lists, and who watches alerts or resumes watching.
    heard: list[Any] = []
    watching = stub.WatchChurnAlerts(pb.WatchChurnAlertsRequest(threshold=0.5))
    listener = threading.Thread(target=lambda: heard.append(next(watching)))
    listener.start()
    eventually(lambda: shop.service.churn._streams == 1, "the stream")
    shop.log.forget(user_id)
    shop.service.churn.tick()
    listener.join(20.0)
    watching.cancel()
    resumed = stub.WatchChurnAlerts(pb.WatchChurnAlertsRequest(threshold=0.5, resume_token=alert.alert_token))
    heard.append(next(resumed))
    resumed.cancel()
    assert [(one.erased, one.risk.user_key, one.alert_token) for one in heard] == [(True, key, "")] * 2
    assert key not in {
        risk.user_key for risk in stub.ListAtRiskUsers(pb.ListAtRiskUsersRequest(min_probability=0.0)).risks
    }
    for table in ("churn_scores", "churn_alerts"):
        left = shop.log.connection.execute(
            f"SELECT count(*) FROM profile.{table} WHERE user_key = %s", (key,)
        ).fetchone()
        assert left == (0,)

    # A damaged version is refused, and the one in service stays.
    directory = shop.settings.registry_path / "churn"
    models = ChurnModels(shop.settings.registry_path, read_verifying_key(shop.settings.keys_path))
    loaded = models.load(version)
    damaged = models.publish(loaded, read_signing_key(shop.settings.keys_path))
    again = models.load(damaged)
    assert (again.reference, again.values, again.quality) == (loaded.reference, loaded.values, loaded.quality)
    path = directory / damaged / "model.json"
    path.write_bytes(path.read_bytes().replace(b'"horizon_days":60', b'"horizon_days":61'))
    shop.service.churn.tick()
    assert stub.GetChurnModel(pb.GetChurnModelRequest()).model_version == version
    manifest = json.loads((directory / version / "manifest.json").read_text())
    with Image.open(directory / version / "reliability.png") as diagram:
        pixels = np.asarray(diagram.convert("RGB"))
    assert all((pixels == colour).all(axis=2).any() for colour in (BLUE, ORANGE))
    assert "reliability.png" in manifest["files"]
    assert manifest["gate"]["verdict"] in ("PASSED", "FAILED")
    assert manifest["signature"]


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("ListAtRiskUsers", {"min_probability": float("nan")}),
        ("ListAtRiskUsers", {"page_size": -1}),
        ("ListAtRiskUsers", {"horizon_days": 400}),
        ("GetChurnModel", {"horizon_days": -1}),
    ],
)
def test_questions_out_of_range_are_refused(
    churn_shop: ChurnShop, method: str, fields: dict[str, Any]
) -> None:
    request = getattr(pb, f"{method}Request")(**fields)
    assert reason_of(lambda: getattr(churn_shop.stub, method)(request)) == "INVALID_REQUEST"
