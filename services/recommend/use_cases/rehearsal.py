"""A draft rule tried on recorded requests, before it goes live."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from services.recommend.domain.recommendation import ListKind, Page, Query, Source
from services.recommend.domain.rehearsal import Estimate, Rehearsal
from services.recommend.domain.rules import Rule
from services.recommend.ports import Clock
from services.recommend.use_cases.configs import Configuration
from services.recommend.use_cases.ranking import Ranking, Snapshot
from services.recommend.use_cases.recommender import Recommender
from shared.identity import UserKey

MAX_DISPLACEMENTS = 100
_ANSWER_SECONDS = 1.0
_Z_95 = 1.959964


class RequestRecorder:
    """The newest first-page requests, in memory alone, by pseudonym; whoever is erased leaves it."""

    def __init__(self, capacity: int) -> None:
        self._lock = threading.Lock()
        self._queries: deque[Query] = deque(maxlen=capacity)

    def record(self, query: Query) -> None:
        """Keeps a query that asks for a first page of recommendations."""
        if query.kind in (ListKind.RECOMMEND, ListKind.CART) and not query.page.offset:
            with self._lock:
                self._queries.append(query)

    def forget(self, user_key: bytes) -> None:
        """Drops what a shopper asked for."""
        with self._lock:
            kept = [query for query in self._queries if query.user_key != user_key]
            self._queries.clear()
            self._queries.extend(kept)

    def newest(self, limit: int) -> list[Query]:
        """Returns the newest queries, newest first."""
        with self._lock:
            return list(self._queries)[: -limit - 1 : -1]


class Rehearser:
    """Replays recorded requests without and with a draft, from one snapshot."""

    def __init__(self, recommender: Recommender, recorder: RequestRecorder, clock: Clock) -> None:
        self._recommender = recommender
        self._recorder = recorder
        self._clock = clock

    def rehearse(self, draft: Rule, serving_config: str, limit: int, budget_seconds: float) -> Rehearsal:
        """Returns what the draft would change, as if it were active now; stops when the budget is used up.

        Clicks are what the model expects: the item's chance of being chosen next, times the chance
        1 / log2(1 + position) that its place is looked at. Revenue is clicks times price.

        Raises:
            NotFound: SERVING_CONFIG_NOT_FOUND.
        """
        deadline = self._clock.monotonic() + budget_seconds
        newest = self._recommender.snapshot(serving_config)
        # The draft's own effect is asked for, not that of a draw.
        config = replace(newest.configuration.config(serving_config), exploration_slots=0)
        configs = {**newest.configuration.configs, serving_config: config}
        snapshot = Snapshot(newest.world, Configuration(configs, newest.configuration.rules))
        before_rules = snapshot.configuration.rules_of(config)
        live = replace(draft, disabled=False, active=())
        after_rules = [*(rule for rule in before_rules if rule.rule_id != draft.rule_id), live]
        shown_before: Counter[int] = Counter()
        shown_after: Counter[int] = Counter()
        totals: dict[UserKey | int, npt.NDArray[np.float64]] = {}
        replayed = changed = 0
        for recorded in self._recorder.newest(limit):
            if self._clock.monotonic() > deadline:
                break
            query = replace(
                recorded,
                serving_config=serving_config,
                consistency=None,
                consistency_text="",
                page=Page(),
                explained=False,
                traced=False,
            )
            before = self._recommender.rank(query, _ANSWER_SECONDS, snapshot, before_rules)
            after = self._recommender.rank(query, _ANSWER_SECONDS, snapshot, after_rules)
            rows_before, rows_after = before.selection.rows_K, after.selection.rows_K
            shown_before.update(rows_before.tolist())
            shown_after.update(rows_after.tolist())
            changed += not np.array_equal(rows_before, rows_after)
            # People, not requests, are independent of each other; a stranger is each their own.
            key = query.user_key if query.user_key is not None else replayed
            scale = _best_score(before, after)
            total = np.array([*_expected(before, scale), *_expected(after, scale)])
            totals[key] = totals.get(key, np.zeros(4)) + total
            replayed += 1
        differences = {
            row: shown_after[row] - shown_before[row] for row in shown_before.keys() | shown_after.keys()
        }
        largest = sorted(
            (row for row, difference in differences.items() if difference),
            key=lambda row: (-abs(differences[row]), row),
        )
        sums_N4 = np.array(list(totals.values())).reshape(-1, 4)
        return Rehearsal(
            replayed,
            changed,
            [
                (snapshot.world.index.id_of(row), shown_before[row], shown_after[row])
                for row in largest[:MAX_DISPLACEMENTS]
            ],
            ratio_change(sums_N4[:, 0], sums_N4[:, 2]),
            ratio_change(sums_N4[:, 1], sums_N4[:, 3]),
        )


def ratio_change(before_N: npt.NDArray[np.float64], after_N: npt.NDArray[np.float64]) -> Estimate:
    """Returns sum(after) / sum(before) - 1 over N people, with the interval of a ratio estimator (delta method)."""
    count, base = len(before_N), float(before_N.sum())
    if base <= 0:
        return Estimate(0.0, -1.0, float("inf"))
    ratio = float(after_N.sum()) / base
    if count < 2:
        return Estimate(ratio - 1, -1.0, float("inf"))
    residual_N = after_N - ratio * before_N
    error = float(np.sqrt(count / (count - 1) * np.square(residual_N).sum())) / base
    return Estimate(ratio - 1, ratio - 1 - _Z_95 * error, ratio - 1 + _Z_95 * error)


def _best_score(*rankings: Ranking) -> float:
    scores = [
        ranking.scores.score_R[ranking.selection.rows_K]
        for ranking in rankings
        if len(ranking.selection.rows_K)
    ]
    finite = [float(score_K[np.isfinite(score_K)].max(initial=-np.inf)) for score_K in scores]
    best = max(finite, default=0.0)
    return best if np.isfinite(best) else 0.0


def _expected(ranking: Ranking, scale: float) -> tuple[float, float]:
    """Returns expected clicks and revenue of a page, in units that are the same for both of a request."""
    rows_K = ranking.selection.rows_K
    score_K = ranking.scores.score_R[rows_K].astype(np.float64)
    if ranking.scores.logits_I is None and ranking.scores.sources != [Source.COSINE]:
        # Counts are proportional to chances; a score of 0 or less is none.
        chance_K = np.maximum(np.where(np.isfinite(score_K), score_K, 0.0), 0.0) / max(abs(scale), 1e-9)
    else:
        chance_K = np.exp(np.minimum(score_K - scale, 0.0))
    click_K = chance_K / np.log2(np.arange(2, len(rows_K) + 2))
    price_K = np.nan_to_num(ranking.world.catalog.numbers("price")[rows_K], nan=0.0)
    return float(click_K.sum()), float((click_K * price_K).sum())
