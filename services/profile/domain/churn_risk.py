"""What is said of one shopper's risk: the probability, the value at stake, and what changed.

K = shoppers who had bought, F = features.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.profile.domain.churn_features import COLUMN, DAY_US, FEATURES, churn_examples
from services.profile.domain.churn_model import ChurnModel, order_values
from services.profile.domain.purchase_log import Bool, Float, Int, PurchaseLog
from services.profile.domain.purchase_values import lifetime_values
from services.profile.domain.win_back import UNKNOWN, Successes, WinBackRates, moments
from shared.identity import UserKey

MAX_REASONS = 3
_LEAST_CONTRIBUTION = 0.01
_MICROS = 1_000_000
_INT64_MAX = 2**63 - 1


class Signal(enum.IntEnum):
    """The numbers are the contract's `ChurnSignal`."""

    OVERDUE_PURCHASE = 1
    SMALLER_ORDERS = 3
    MORE_RETURNS = 4
    NARROWER_INTERESTS = 6


class Action(enum.IntEnum):
    """The numbers are the contract's `WinBackActionKind`."""

    RECOMMEND_ITEMS = 1
    REPLENISHMENT_REMINDER = 2
    SERVICE_CALL = 4


FEATURES_OF_SIGNAL: dict[Signal, tuple[str, ...]] = {
    Signal.SMALLER_ORDERS: (
        "amount", "mean_amount", "last_amount_ratio", "decayed_amount_60", "unit_price", "pieces_per_line",
    ),
    Signal.MORE_RETURNS: ("returned_share", "days_since_return"),
    Signal.NARROWER_INTERESTS: (
        "distinct_items", "lines_per_order", "last_lines_ratio", "repeated_item_share", "items_trend",
    ),
}  # fmt: skip
_ELSEWHERE = {name for names in FEATURES_OF_SIGNAL.values() for name in names}
# What was bought is no change of the shopper's.
_NO_SIGNAL = {"item_return_rate", "item_freshness", "item_popularity", "same_season_orders"}
FEATURES_OF_SIGNAL[Signal.OVERDUE_PURCHASE] = tuple(
    name for name in FEATURES if name not in _ELSEWHERE | _NO_SIGNAL
)


@dataclass(frozen=True, slots=True)
class Reason:
    """What changed: its share in the log-odds of leaving, the usual value and today's, in the signal's unit."""

    signal: Signal
    contribution: float
    usual_value: float
    current_value: float


@dataclass(frozen=True, slots=True)
class WinBack:
    """What may win a shopper back, and how often similar ones came back to it."""

    action: Action
    successes: Successes


@dataclass(frozen=True, slots=True)
class ChurnRisk:
    """The risk of one shopper.

    Attributes:
        probability: of no purchase within the horizon, in [0, 1].
        alive_probability: BG/NBD's, in [0, 1].
        lifetime_value_micros: over a year, >= 0, in the currency of most purchases.
        order_count: what the numbers rest on.
        reasons: strongest first.
        actions: what wins most back first; those whose success is not known last.
    """

    user_key: UserKey
    probability: float
    alive_probability: float
    lifetime_value_micros: int
    order_count: int
    reasons: tuple[Reason, ...]
    actions: tuple[WinBack, ...]


class ScoredShoppers:
    """Everybody's risk as of one moment, sorted by falling probability, then by ascending user key.

    Columns only: a shopper costs some 150 bytes.

    Attributes:
        key_K: 16 bytes each, (K,).
        probability_K: float64, (K,).
    """

    def __init__(
        self,
        model: ChurnModel,
        log: PurchaseLog,
        user_keys_U: Sequence[bytes],
        now_us: int,
        currency_code: str,
        margin_share: float = 1.0,
        win_back: WinBackRates | None = None,
    ) -> None:
        """Scores everybody who had bought by now.

        Args:
            user_keys_U: by the log's number of the shopper, ascending.
            margin_share: the share of an order's worth that is the shop's margin.
            win_back: what won whom back; None where it is not known.
        """
        examples = churn_examples(log, now_us, float(model.horizon_days), model.reference)
        self.model = model
        self.as_of_us = now_us
        self.currency_code = currency_code
        self._win_back = win_back or WinBackRates()
        probability = model.probabilities(examples)
        packed = b"".join(bytes(user_keys_U[user]) for user in examples.user_K.tolist())
        keys = np.frombuffer(packed, "V16")
        # Numbers of shoppers ascend with their keys.
        order = np.lexsort((examples.user_K, -probability))
        worth = np.zeros(len(examples))
        if model.values is not None and len(examples):
            _, x_U, m_U = order_values(log.before(now_us))
            values = model.values.expected_values(x_U[examples.user_K], m_U[examples.user_K])
            worth = lifetime_values(examples.counts, model.reference, values) * margin_share
        features = examples.feature_KF
        contribution_KF = model.contributions(examples)
        # What most shoppers do is no reason: a contribution is told from the middle of all.
        if len(examples):
            contribution_KF = contribution_KF - np.median(contribution_KF, axis=0)
        self.key_K = keys[order]
        self.user_K = examples.user_K[order]
        self.probability_K = probability[order]
        self._alive_K = model.reference.alive_probabilities(examples.counts)[order]
        self._worth_K = worth[order]
        self._orders_K = features[order, COLUMN["orders"]]
        self._contribution_KS = np.stack(
            [contribution_KF[:, [COLUMN[n] for n in FEATURES_OF_SIGNAL[s]]].sum(axis=1) for s in Signal],
            axis=1,
        )[order].astype(np.float32)
        self._usual_KS, self._current_KS = (
            columns[order].astype(np.float64) for columns in _usual_and_current(features)
        )
        self._repeats_K = features[order, COLUMN["repeated_item_share"]]
        self._row_of_key = {key.tobytes(): row for row, key in enumerate(self.key_K)}

    def __len__(self) -> int:
        return len(self.probability_K)

    def row_of(self, user_key: bytes) -> int | None:
        """Returns the row of a shopper; None for who never bought."""
        return self._row_of_key.get(bytes(user_key))

    def risk(self, row: int) -> ChurnRisk:
        """Returns all that is said of the shopper in a row."""
        reasons = sorted(
            (
                Reason(signal, float(c), float(usual), float(current))
                for signal, c, usual, current in zip(
                    Signal,
                    self._contribution_KS[row],
                    self._usual_KS[row],
                    self._current_KS[row],
                    strict=True,
                )
                if c > _LEAST_CONTRIBUTION and _worse(signal, float(usual), float(current))
            ),
            key=lambda reason: -reason.contribution,
        )[:MAX_REASONS]
        return ChurnRisk(
            UserKey(self.key_K[row].tobytes()),
            float(self.probability_K[row]),
            float(self._alive_K[row]),
            min(_INT64_MAX, round(float(self._worth_K[row]) * _MICROS)),
            int(self._orders_K[row]),
            tuple(reasons),
            self._actions(reasons, row),
        )

    def strongest_signals(self) -> Int:
        """Returns the strongest reason of each shopper, (K,), int64; 0 where there is none."""
        signal_S = np.array([int(signal) for signal in Signal])
        worse_KS = np.stack(
            [
                _worse_column(signal, self._usual_KS[:, at], self._current_KS[:, at])
                for at, signal in enumerate(Signal)
            ],
            axis=1,
        ) & (self._contribution_KS > _LEAST_CONTRIBUTION)
        strongest_K = np.where(worse_KS, self._contribution_KS, -np.inf).argmax(axis=1)
        return np.where(worse_KS.any(axis=1), signal_S[strongest_K], 0).astype(np.int64)

    def _actions(self, reasons: Sequence[Reason], row: int) -> tuple[WinBack, ...]:
        signal = int(reasons[0].signal) if reasons else 0
        probability = float(self.probability_K[row])
        actions = [
            WinBack(action, successes)
            for action, successes in (
                # Calls are not in the log: nobody knows whom they won back.
                (Action.SERVICE_CALL, UNKNOWN),
                (Action.REPLENISHMENT_REMINDER, self._win_back.of_repeated(signal, probability)),
                (Action.RECOMMEND_ITEMS, self._win_back.of_discovered(signal, probability)),
            )
            if action in _suited(reasons, float(self._repeats_K[row]))
        ]
        return tuple(sorted(actions, key=lambda one: -one.successes.rate))

    def after(self, probability: float, user_key: bytes) -> int:
        """Returns the first row behind a place in the order; who held it need not be there any more."""
        begin = int(np.searchsorted(-self.probability_K, -probability, "left"))
        end = int(np.searchsorted(-self.probability_K, -probability, "right"))
        while begin < end and self.key_K[begin].tobytes() <= user_key:
            begin += 1
        return begin


def _usual_and_current(feature_KF: Float) -> tuple[Float, Float]:
    def column(name: str) -> Float:
        return feature_KF[:, COLUMN[name]]

    lines, amount = column("lines_per_order"), column("mean_amount") * _MICROS
    usual_returns = np.full(len(feature_KF), np.median(column("returned_share")) if len(feature_KF) else 0.0)
    usual = (column("mean_gap_days"), amount, usual_returns, lines)
    current = (
        column("recency_days"),
        amount * column("last_amount_ratio"),
        column("returned_share"),
        lines * column("last_lines_ratio"),
    )
    return np.stack(usual, axis=1), np.stack(current, axis=1)


def _worse(signal: Signal, usual: float, current: float) -> bool:
    """Returns whether a change is of the direction that the signal's name promises."""
    return current > usual if signal in (Signal.OVERDUE_PURCHASE, Signal.MORE_RETURNS) else current < usual


def _worse_column(signal: Signal, usual_K: Float, current_K: Float) -> Bool:
    return (
        current_K > usual_K
        if signal in (Signal.OVERDUE_PURCHASE, Signal.MORE_RETURNS)
        else current_K < usual_K
    )


def _suited(reasons: Sequence[Reason], repeated_item_share: float) -> set[Action]:
    actions = {Action.RECOMMEND_ITEMS}
    if any(reason.signal is Signal.MORE_RETURNS for reason in reasons):
        actions.add(Action.SERVICE_CALL)
    if repeated_item_share > 0.3:
        actions.add(Action.REPLENISHMENT_REMINDER)
    return actions


def win_back_rates(model: ChurnModel, log: PurchaseLog, now_us: int) -> WinBackRates:
    """Returns what won whom back, as the model would have seen them then."""
    rates = WinBackRates()
    if not len(log):
        return rates
    horizon_us = int(model.horizon_days * DAY_US)
    # Keys say nothing here, and are only sorted by.
    keys = [user.to_bytes(16, "big") for user in range(log.user_count)]
    for moment in moments(now_us, horizon_us, int(log.time_us_N.min())):
        scored = ScoredShoppers(model, log.before(moment), keys, moment, "")
        rates.add(
            log, moment, moment + horizon_us, scored.user_K, scored.probability_K, scored.strongest_signals()
        )
    return rates
