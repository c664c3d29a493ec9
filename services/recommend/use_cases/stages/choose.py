"""The page: tiers, diversity, rules, exploration."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from services.recommend.domain.live_counts import LiveCounts
from services.recommend.domain.ranking import top_rows
from services.recommend.domain.recommendation import Cause, Degradation, ListKind, Source
from services.recommend.use_cases.exploration import explore
from services.recommend.use_cases.ranking import BEHIND_THE_PAGE, MAX_PAGED_ITEMS, PERSONAL, Ranking
from services.recommend.use_cases.rules import arrange, has_room
from services.recommend.use_cases.scoring import newest_scores, popular_scores
from services.recommend.use_cases.selection import Selection, Tier, select

MAX_PAGE_SIZE = 100
_DIVERSITY_SECONDS = 0.001
_EXPLORED_BEHIND = 100
_EXPLORED_NEW = 50


class Choosing:
    """Makes a page of the scores of one request.

    Args:
        counts: what is popular now, for pages that a filter leaves short.
        new_id: makes 8 random bytes, where the caller sends no seed.
    """

    def __init__(self, counts: LiveCounts, new_id: Callable[[], bytes]) -> None:
        self._counts = counts
        self._new_id = new_id

    def choose(self, ranking: Ranking) -> Selection:
        """Returns the page; its tiers, and what rules and exploration did, are left in the ranking."""
        world, query, config, scores = ranking.world, ranking.query, ranking.config, ranking.scores
        eligibility = ranking.eligibility
        count = min(query.page_size or ranking.policy.default_page_size, MAX_PAGE_SIZE)
        count = min(count, MAX_PAGED_ITEMS - query.page.offset)
        personal = query.kind in PERSONAL
        by_vectors = (
            scores.model_history is not None or bool(scores.parts) or scores.sources == [Source.COSINE]
        )
        if personal and by_vectors and config.diversity_strength > 0:
            if ranking.remaining() > _DIVERSITY_SECONDS:
                ranking.strength = config.diversity_strength
            else:
                ranking.degraded.append(
                    Degradation(Cause.DEADLINE_DIVERSITY_SKIPPED, "left out to keep the deadline")
                )
        made: dict[int, Tier] = {}
        unseen_R, seen_R = eligibility.split_by_seen()

        plan = ranking.plan
        if plan is not None and plan.shifts:
            ranking.order_R = plan.order(scores.score_R, eligibility.eligible_R)

        def first() -> Tier:
            return Tier(scores.sources[0], scores.score_R, unseen_R, ranking.order_R, scores.rows_C)

        def new_items() -> Tier:
            # What the model has not learnt yet comes after everything that it has: never lost, never first.
            if scores.rows_C is not None:
                rows_C = world.unlearnt_rows
                return Tier(Source.NEW_ITEMS, newest_scores(world), eligibility.eligible_R, rows_C=rows_C)
            return Tier(
                Source.NEW_ITEMS, newest_scores(world), eligibility.eligible_R & (scores.score_R == -np.inf)
            )

        def seen_items() -> Tier:
            # Rather something they know than nothing.
            return Tier(scores.sources[0], scores.score_R, seen_R, ranking.order_R, scores.rows_C)

        def outside_filter() -> Tier:
            popular_R = popular_scores(world, self._counts, ranking.now).score_R
            return Tier(Source.POPULAR, popular_R, eligibility.unfiltered_R)

        makers: list[Callable[[], Tier]] = [first]
        if personal and scores.sources != [Source.NEW_ITEMS]:
            makers.append(new_items)
        if len(eligibility.exclusions.seen):
            makers.append(seen_items)
        fills_up = query.fill_up and query.kind is not ListKind.BUY_AGAIN
        if fills_up and eligibility.filter_R is not None:
            makers.append(outside_filter)

        def remembered(number: int) -> Callable[[], Tier]:
            def make() -> Tier:
                made[number] = makers[number]()
                return made[number]

            return make

        explores = personal and config.exploration_slots > 0 and config.exploration_probability > 0
        further = BEHIND_THE_PAGE if explores or (plan is not None and plan.arranges) else 0
        selection = self._choose(ranking, [remembered(n) for n in range(len(makers))], count, further)
        behind = selection.rows_K[count:]
        if plan is not None and plan.arranges:
            selection, behind = self._arranged(ranking, selection, len(makers), count)
            while len(selection.rows_K) < count and further < world.size and selection.has_more:
                # Caps have used the candidates up: more of them, or all.
                further *= 8
                plan.moved.clear()
                plan.displaced.clear()
                pool = self._choose(ranking, [remembered(n) for n in range(len(makers))], count, further)
                selection, behind = self._arranged(ranking, pool, len(makers), count)
                if not pool.has_more:
                    break
            made[len(makers)] = Tier(Source.RULE, np.zeros(world.size, np.float32), eligibility.eligible_R)
        elif further:
            selection = selection.first(count)
        if explores:
            selection = self._explore(ranking, selection, behind)
            made.setdefault(1, new_items())
        ranking.tiers = [made[n] if n in made else made[0] for n in range(max(made) + 1)]
        if makers[-1] is outside_filter and len(makers) - 1 in selection.tiers_K:
            ranking.degraded.append(
                Degradation(
                    Cause.FILTER_FALLBACK, "the filter leaves too few items; popular ones fill the page"
                )
            )
        return selection

    def _choose(
        self, ranking: Ranking, tiers: list[Callable[[], Tier]], count: int, further: int
    ) -> Selection:
        depth = ranking.config.diversity_depth
        algorithm = ranking.config.diversity_algorithm
        return select(tiers, count, ranking.world.model, ranking.strength, depth, further, algorithm)

    @staticmethod
    def _arranged(
        ranking: Ranking, pool: Selection, pin_tier: int, count: int
    ) -> tuple[Selection, np.ndarray]:
        assert ranking.plan is not None
        order_R = ranking.scores.score_R if ranking.order_R is None else ranking.order_R
        return arrange(
            pool,
            ranking.plan,
            ranking.world,
            ranking.eligibility.eligible_R,
            order_R,
            count,
            ranking.query.page.offset,
            pin_tier,
        )

    def _explore(self, ranking: Ranking, page: Selection, behind: np.ndarray) -> Selection:
        query, config, world, plan = ranking.query, ranking.config, ranking.world, ranking.plan
        ranking.seed = query.page.seed or query.seed or int.from_bytes(self._new_id(), "big") >> 1 or 1
        unlearnt_R = ranking.eligibility.eligible_R & (ranking.scores.score_R == -np.inf)
        unlearnt_R[page.rows_K] = False
        unlearnt_rows = None if ranking.scores.rows_C is None else world.unlearnt_rows
        newest = top_rows(newest_scores(world), unlearnt_R, _EXPLORED_NEW, unlearnt_rows)
        behind = behind[:_EXPLORED_BEHIND]
        candidates_E = np.concatenate([behind, newest[~np.isin(newest, behind)]]).astype(np.int32)
        open_places = list(range(len(page.rows_K)))
        if plan is not None:
            # What a rule has placed, or a share may need, stays; and no draw may break a cap.
            open_places = [
                place
                for place, row in enumerate(page.rows_K.tolist())
                if row not in plan.moved and not any(mask_R[row] for _, mask_R, _ in plan.shares)
            ]
            slots = config.exploration_slots
            pinned = {row for _, row, _ in plan.pins}
            candidates_E = np.array(
                [
                    row
                    for row in candidates_E.tolist()
                    if row not in pinned and has_room(plan, page, row, world.catalog, slots)
                ],
                np.int32,
            )
        explored = explore(
            page.rows_K,
            open_places,
            candidates_E,
            config.exploration_slots,
            config.exploration_probability,
            np.random.default_rng([ranking.seed % 2**64, query.page.offset]),
        )
        places = list(explored.places)
        ranking.explored = frozenset(explored.rows_K[places].tolist())
        ranking.propensities_K = explored.propensities_K
        if not places:
            return page
        scores_K, tiers_K = page.scores_K.copy(), page.tiers_K.copy()
        drawn = explored.rows_K[places]
        scored = ranking.scores.score_R[drawn] > -np.inf
        lowest = float(page.scores_K.min()) - 1
        scores_K[places] = np.where(scored, ranking.scores.score_R[drawn], np.float32(lowest))
        tiers_K[places] = np.where(scored, 0, 1)
        return Selection(explored.rows_K, scores_K, tiers_K, True)
