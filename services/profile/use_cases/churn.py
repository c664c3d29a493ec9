"""Who is about to leave: trains, scores everybody again and again, and tells of rises."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from services.profile.domain.churn_model import ChurnModel, NotEnoughHistory, Trainer
from services.profile.domain.churn_risk import ChurnRisk, ScoredShoppers, win_back_rates
from services.profile.domain.win_back import WinBackRates
from services.profile.ports import ChurnAlerts, ChurnModels, Metrics, Purchases, StoredAlert, Suggestions
from shared.errors import DataLoss, FailedPrecondition, Unavailable
from shared.identity import UserKey

TICK_SECONDS = 5.0
ALERT_POLL_SECONDS = 0.25
ALERTS_IN_POLL = 500
# Training is bounded: shoppers beyond these add little that a model of some forty features can learn.
MAX_TRAINING_SHOPPERS = 100_000
# Rows looked through for one page, so that a rare segment cannot hold a call for ever.
MAX_ROWS_IN_CALL = 20_000
_ROWS_AT_ONCE = 200
MAX_SUGGESTED_ITEMS = 10
# What wins people back changes by the season, not by the hour.
WIN_BACK_US = 24 * 3600 * 1_000_000

Members = Callable[[Sequence[UserKey]], Sequence[bool]]


def train_churn(purchases: Purchases, horizon_days: int, now_us: int) -> ChurnModel:
    """Trains on the log as of its newest line, for a log that has ended says nothing of what came later.

    Raises:
        FailedPrecondition: nobody has bought anything.
        Unavailable: the log cannot be read.
    """
    history = purchases.read(for_training=True, before_us=now_us)
    log = history.log
    if log.user_count > MAX_TRAINING_SHOPPERS:
        every = -(-log.user_count // MAX_TRAINING_SHOPPERS)
        log = log.where(log.user_N % every == 0)
    if not len(log):
        raise FailedPrecondition(
            "NO_PURCHASES", "The log holds no purchase to learn from; import some first."
        )
    try:
        return Trainer(log, horizon_days).train(int(log.time_us_N.max()) + 1)
    except NotEnoughHistory as error:
        raise FailedPrecondition("NO_PURCHASES", f"There is too little to learn from: {error}.") from error


@dataclass(frozen=True, slots=True)
class RiskPage:
    """Risks by falling probability; `more` where further ones may follow `last`."""

    risks: Sequence[ChurnRisk]
    last: tuple[float, bytes] | None
    more: bool


@dataclass(frozen=True, slots=True)
class Alert:
    """A crossing, with the risk as it is now known; `risk` is None for who is no longer scored."""

    stored: StoredAlert
    risk: ChurnRisk | None


@dataclass(frozen=True, slots=True)
class Erasure:
    """A shopper was erased: who keeps alerts forgets theirs."""

    user_key: UserKey


@dataclass(frozen=True, slots=True)
class Scores:
    """Everybody's risk, by a version of the model."""

    version: str
    shoppers: ScoredShoppers


class ChurnWatch:
    """Keeps everybody's risk in memory. One thread calls `run`; anybody may call the rest.

    Args:
        score_seconds: how often everybody is scored.
        margin_share: the share of an order's worth that is the shop's margin.
        suggestions: draws the items that may win somebody back; None where there is nobody to ask.
    """

    def __init__(
        self,
        purchases: Purchases,
        models: ChurnModels,
        alerts: ChurnAlerts,
        metrics: Metrics,
        clock_us: Callable[[], int],
        score_seconds: float,
        margin_share: float,
        suggestions: Suggestions | None = None,
    ) -> None:
        self._purchases = purchases
        self._models = models
        self._alerts = alerts
        self._metrics = metrics
        self._clock_us = clock_us
        self._score_us = int(score_seconds * 1e6)
        self._margin_share = margin_share
        self._suggestions = suggestions
        self._version: str | None = None
        self._model: ChurnModel | None = None
        self._refused: str | None = None
        self._scores: Scores | None = None
        # The version of the model, when to look again, and what won whom back.
        self._win_back: tuple[str, int, WinBackRates] | None = None
        self._erased: frozenset[UserKey] = frozenset()
        self._due_us = 0
        self._problem = ""
        self._streams = 0
        self._lock = threading.Lock()
        self._ticking = threading.Lock()
        self._stopping = threading.Event()

    def run(self) -> None:
        """Ticks until `stop`; survives every outage."""
        while not self._stopping.is_set():
            try:
                self.tick()
                self._problem = ""
            except Unavailable as error:
                self._problem = error.message
            self._stopping.wait(TICK_SECONDS)

    def stop(self) -> None:
        """Ends `run` and every stream."""
        self._stopping.set()

    def tick(self) -> None:
        """Loads a new model, forgets whoever was erased, and scores everybody when it is time.

        A model that cannot be loaded is refused once, and the one in service stays.

        Raises:
            Unavailable: the database does not answer.
        """
        # One at a time: scores that come out last are those of the newest reading.
        with self._ticking:
            self._tick()

    def _tick(self) -> None:
        self._erased = frozenset(self._alerts.erase_forgotten())
        self._reload()
        now_us = self._clock_us()
        if self._model is not None and self._version is not None and now_us >= self._due_us:
            self._score(self._model, self._version, now_us)
            self._due_us = now_us + self._score_us

    def score_now(self) -> None:
        """Ticks, and scores whether it is time or not."""
        with self._ticking:
            self._due_us = 0
            self._tick()

    def model(self, horizon_days: int) -> tuple[str, ChurnModel]:
        """Returns the model in service and its version; 0 stands for whatever horizon it has.

        Raises:
            FailedPrecondition: there is none for this horizon.
        """
        version, model = self._version, self._model
        if model is None or version is None:
            why = f" The last one was refused: {self._refused}" if self._refused else ""
            raise FailedPrecondition(
                "NO_CHURN_MODEL",
                f"No churn model is in service; run `python -m services.profile train-churn`.{why}",
            )
        if horizon_days not in (0, model.horizon_days):
            raise FailedPrecondition(
                "NO_CHURN_MODEL",
                f"The churn model in service speaks of {model.horizon_days} days, not of {horizon_days}; "
                f"ask for those, or run `python -m services.profile train-churn --horizon-days {horizon_days}`.",
                {"horizonDays": str(model.horizon_days)},
            )
        return version, model

    def scores(self, horizon_days: int = 0) -> Scores:
        """Returns everybody's risk.

        Raises:
            FailedPrecondition: no model serves this horizon.
            Unavailable: nobody has been scored yet.
        """
        version, _ = self.model(horizon_days)
        scores = self._scores
        if scores is None:
            raise Unavailable(
                "LOG_UNAVAILABLE",
                f"Shoppers are being scored by churn model {version}; retry. {self._problem}".rstrip(),
                retry_after_seconds=1.0,
            )
        return scores

    def risk_of(self, user_key: UserKey) -> tuple[Scores, ChurnRisk] | None:
        """Returns the risk of one shopper; None where none is known."""
        scores = self._scores
        if scores is None or user_key in self._erased:
            return None
        row = scores.shoppers.row_of(user_key)
        return None if row is None else (scores, scores.shoppers.risk(row))

    def suggested(self, user_keys: Sequence[UserKey]) -> list[list[str]]:
        """Returns items that may win each shopper back, the best first; none where nobody can be asked."""
        if self._suggestions is None or not user_keys:
            return [[] for _ in user_keys]
        return self._suggestions.items(user_keys, MAX_SUGGESTED_ITEMS)

    def page(
        self,
        scores: Scores,
        min_probability: float,
        after: tuple[float, bytes] | None,
        limit: int,
        members: Members | None,
    ) -> RiskPage:
        """Returns who is likely to leave, behind a place in the order."""
        shoppers = scores.shoppers
        row = 0 if after is None else shoppers.after(*after)
        end = int(np.searchsorted(-shoppers.probability_K, -min_probability, "right"))
        stop = min(end, row + MAX_ROWS_IN_CALL)
        risks: list[ChurnRisk] = []
        last = after
        while row < stop and len(risks) < limit:
            rows = range(row, min(stop, row + min(_ROWS_AT_ONCE, limit - len(risks))))
            keys = [UserKey(shoppers.key_K[at].tobytes()) for at in rows]
            inside = members(keys) if members is not None else [True] * len(keys)
            for at, key, chosen in zip(rows, keys, inside, strict=True):
                last = (float(shoppers.probability_K[at]), key)
                if chosen and key not in self._erased:
                    risks.append(shoppers.risk(at))
            row = rows.stop
        return RiskPage(risks, last, row < end)

    def watch(
        self,
        horizon_days: int,
        threshold: float,
        after_alert_id: int | None,
        is_active: Callable[[], bool],
        members: Members | None,
    ) -> Iterator[Alert | Erasure]:
        """Yields crossings of the threshold until closed, those behind an id first, and erasures.

        Raises:
            FailedPrecondition: no model serves this horizon.
            Unavailable: the database does not answer.
        """
        _, model = self.model(horizon_days)
        position = self._alerts.newest() if after_alert_id is None else after_alert_id
        # Who resumes may hold alerts of anybody who was erased meanwhile.
        told = self._erased if after_alert_id is None else frozenset()
        self._count(1)
        try:
            while is_active() and not self._stopping.is_set():
                erased = self._erased
                if erased is not told:
                    yield from map(Erasure, sorted(erased - told))
                    told = erased
                position, found = self._alerts.after(position, model.horizon_days, threshold, ALERTS_IN_POLL)
                wanted = [stored for stored in found if stored.user_key not in self._erased]
                if members is not None and wanted:
                    inside = members([stored.user_key for stored in wanted])
                    wanted = [stored for stored, chosen in zip(wanted, inside, strict=True) if chosen]
                for stored in wanted:
                    known = self.risk_of(stored.user_key)
                    yield Alert(stored, known[1] if known else None)
                if not found:
                    self._stopping.wait(ALERT_POLL_SECONDS)
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self._streams += change
            self._metrics.watchers("churn_alerts", self._streams)

    def _reload(self) -> None:
        try:
            version = self._models.current_version()
            if version is None or version == self._version:
                return
            self._model = self._models.load(version)
        except DataLoss as error:
            self._refused = error.message
            return
        # Others read the version first: both belong to one model by the time that scores appear.
        self._version, self._refused, self._due_us = version, None, 0

    def _score(self, model: ChurnModel, version: str, now_us: int) -> None:
        history = self._purchases.read(for_training=False, before_us=now_us)
        if self._win_back is None or self._win_back[0] != version or now_us >= self._win_back[1]:
            rates = win_back_rates(model, history.log, now_us)
            self._win_back = version, now_us + WIN_BACK_US, rates
        shoppers = ScoredShoppers(
            model,
            history.log,
            history.user_keys,
            now_us,
            history.currency_code,
            self._margin_share,
            self._win_back[2],
        )
        self._scores = Scores(version, shoppers)
        packed = shoppers.key_K.tobytes()
        keys = [packed[at : at + 16] for at in range(0, len(packed), 16)]
        risen = self._alerts.record(keys, shoppers.probability_K.tolist(), model.horizon_days, version)
        self._metrics.alerted(risen)
