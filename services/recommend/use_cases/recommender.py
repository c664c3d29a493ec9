"""The pipeline: history, scores, eligibility, order, reasons, token.

Every step works on arrays over the whole catalogue; Python objects are made for
the items of the page alone. The first thing that a request does is to take one
`World`; model and catalogue may change behind it, the answer does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from services.recommend.domain.history import NO_HISTORY, History
from services.recommend.domain.item_index import ItemIndex
from services.recommend.domain.live_counts import LiveCounts
from services.recommend.domain.ranking import top_rows
from services.recommend.domain.recommendation import (
    Answer,
    Cause,
    ContextEvent,
    Degradation,
    Freshness,
    ListKind,
    Page,
    Query,
    Reason,
    ReasonKind,
    Source,
    Stage,
    Verdict,
)
from services.recommend.domain.rules import Rule
from services.recommend.domain.serving_config import PlacementPolicy, Scorer, ServingConfig
from services.recommend.ports import (
    CatalogStream,
    Clock,
    Experiments,
    FilterParser,
    Float32,
    Model,
    Observer,
)
from services.recommend.use_cases.configs import Configuration, ServingConfigs
from services.recommend.use_cases.eligibility import (
    Eligibility,
    Exclusions,
    FilterMasks,
    judge,
    rows_of,
    rows_within,
    shown_rows,
)
from services.recommend.use_cases.exploration import explore
from services.recommend.use_cases.histories import STALE_AFTER_SECONDS, HistoryReader
from services.recommend.use_cases.reasons import reasons_for
from services.recommend.use_cases.rules import RulePlan, arrange, has_room, plan_rules
from services.recommend.use_cases.scoring import (
    Scores,
    blended_scores,
    buy_again,
    cosine_scores,
    newest_scores,
    popular_scores,
    searched_scores,
    similar_scores,
    together_scores,
    trending_scores,
)
from services.recommend.use_cases.selection import Selection, Tier, select
from services.recommend.use_cases.shadow import Shadow
from services.recommend.use_cases.world import World, Worlds
from shared.errors import NotFound
from shared.event_kinds import EventKind
from shared.experiments import assign
from shared.tokens import AttributionToken

MAX_PAGE_SIZE = 100
MAX_PAGED_ITEMS = 1_000
"""Items after which there is no further page: nobody pages so far, and the token grows with them."""

# Lists that follow from the shopper's history, in which what they have seen comes after all else.
_PERSONAL = (ListKind.RECOMMEND, ListKind.CART)
_ENCODE_SECONDS = 0.002
_DIVERSITY_SECONDS = 0.001
_EXPLANATION_SECONDS = 0.005
_CART_EVENTS = 100
_SHADOW_SECONDS = 5.0
_BEHIND_THE_PAGE = 200
"""Candidates behind the page from which rules and exploration choose."""
_EXPLORED_BEHIND = 100
_EXPLORED_NEW = 50
_MOST_MOVED = 50_000
"""Items that rules add to what a search finds in a large catalogue."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What answers that are to agree are made from."""

    world: World
    configuration: Configuration


@dataclass(slots=True)
class Ranking:
    """One request on its way: what every stage has found so far."""

    query: Query
    world: World
    config: ServingConfig
    policy: PlacementPolicy
    now: float
    deadline: float
    history: History = NO_HISTORY
    degraded: list[Degradation] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    timings: list[tuple[str, float]] = field(default_factory=list)
    freshness: Freshness = field(default_factory=Freshness)
    scores: Scores = field(init=False)
    eligibility: Eligibility = field(init=False)
    tiers: list[Tier] = field(default_factory=list)
    selection: Selection = field(init=False)
    strength: float = 0.0
    reasons: Sequence[Sequence[Reason]] = ()
    plan: RulePlan | None = None
    order_R: Float32 | None = None
    seed: int = 0
    explored: frozenset[int] = frozenset()
    propensities_K: Float32 | None = None


class Recommender:
    """Answers every question that asks for items.

    Args:
        worlds: the models and the catalogue of each request.
        histories: what shoppers did.
        counts: what is popular now.
        filters: compiled filters.
        catalog_stream: how fresh the catalogue is.
        observer: told of stages and degradations.
        clock: time.
        new_id: makes 8 random bytes for each answer.
        configs: by id.
        record: told of each query that is answered.
        experiments: what runs, for requests that leave serving config and variant to the service.
        shadow: compares answers with those of a second model, where a config names one.
    """

    def __init__(
        self,
        *,
        worlds: Worlds,
        histories: HistoryReader,
        counts: LiveCounts,
        filters: FilterParser,
        catalog_stream: CatalogStream,
        observer: Observer,
        clock: Clock,
        new_id: Callable[[], bytes],
        configs: ServingConfigs,
        record: Callable[[Query], None] | None = None,
        experiments: Experiments | None = None,
        shadow: Shadow | None = None,
    ) -> None:
        self._worlds = worlds
        self._histories = histories
        self._counts = counts
        self._filters = FilterMasks(filters)
        self._catalog_stream = catalog_stream
        self._observer = observer
        self._clock = clock
        self._new_id = new_id
        self._configs = configs
        self._record = record
        self._experiments = experiments
        self._shadow = shadow

    def answer(self, query: Query, budget_seconds: float, snapshot: Snapshot | None = None) -> Answer:
        """Returns a page of recommendations, within the budget.

        Raises:
            InvalidInput: the filter does not parse, or profile refuses the consistency token.
            NotFound: SERVING_CONFIG_NOT_FOUND; ITEM_NOT_FOUND for SIMILAR.
        """
        if self._record is not None:
            self._record(query)
        ranking = self.rank(self._assigned(query), budget_seconds, snapshot)
        answer = self.assemble(ranking)
        if self._shadow is not None and ranking.config.shadow_model_alias:
            self._compare(ranking)
        return answer

    def snapshot(self, serving_config: str = "default") -> Snapshot:
        """Returns the newest world and configuration, for several answers of a config that are to agree.

        Raises:
            NotFound: SERVING_CONFIG_NOT_FOUND.
        """
        configuration = self._configs.current()
        return Snapshot(self._worlds.of(configuration.config(serving_config)), configuration)

    def _assigned(self, query: Query) -> Query:
        """Returns the query with the serving config and the variant of the experiment on its placement."""
        if self._experiments is None or not query.assignable or query.user_key is None:
            return query
        split = self._experiments.split(query.placement)
        assignment = None if split is None else assign(bytes(query.user_key), split)
        if assignment is None or assignment.serving_config not in self._configs.current().configs:
            return query
        return replace(query, serving_config=assignment.serving_config, variant=assignment.label)

    def _compare(self, ranking: Ranking) -> None:
        """Has the second model answer the same, later and on another thread."""
        config = ranking.config
        world = self._worlds.other(config.model, config.shadow_model_alias)
        if self._shadow is None or world is None:
            return
        query = replace(ranking.query, consistency=None, consistency_text="", explained=False, traced=False)
        snapshot = Snapshot(world, self._configs.current())
        shown_K = ranking.selection.rows_K
        self._shadow.later(
            config.serving_config_id,
            ranking.world,
            world,
            shown_K,
            lambda: self.rank(query, _SHADOW_SECONDS, snapshot).selection.rows_K,
        )

    def rank(
        self,
        query: Query,
        budget_seconds: float,
        snapshot: Snapshot | None = None,
        rules: Sequence[Rule] | None = None,
    ) -> Ranking:
        """Runs the pipeline up to the chosen page; raises as `answer` does.

        Args:
            snapshot: what to answer from; None: the newest.
            rules: in place of those of the serving config.
        """
        started = self._clock.monotonic()
        configuration = self._configs.current() if snapshot is None else snapshot.configuration
        config = configuration.config(query.serving_config)
        ranking = Ranking(
            query=query,
            world=self._worlds.of(config) if snapshot is None else snapshot.world,
            config=config,
            policy=config.policy(query.placement),
            now=self._clock.now(),
            deadline=started + budget_seconds,
        )
        rules = configuration.rules_of(config) if rules is None else rules
        # A filter that does not parse fails before any waiting.
        filter_R = self._filters.mask(query.filter_text, ranking.world.catalog) if query.filter_text else None

        self._read_history(ranking)
        if query.consistency is not None and snapshot is None:
            # Waiting takes time in which a model or the catalogue may have changed: take the newest.
            ranking.world = self._worlds.of(config)
            if query.filter_text:
                filter_R = self._filters.mask(query.filter_text, ranking.world.catalog)
        mark = self._stage(ranking, "profile", started, len(ranking.history), len(ranking.history))

        # Before the scores: a search asks for more where little of what it finds may be shown.
        if rules:
            ranking.plan = plan_rules(rules, query.placement, ranking.now, ranking.world, self._filters)
        ranking.eligibility = self._judge(ranking, filter_R)
        # Counting takes passes over the catalogue, and interests nobody who has not asked.
        eligible = int(np.count_nonzero(ranking.eligibility.eligible_R)) if query.traced else 0
        mark = self._stage(ranking, "filter", mark, ranking.world.size, eligible)

        ranking.scores = scores = self._score(ranking)
        ranking.degraded += scores.degraded
        scored = int(np.count_nonzero(scores.score_R > -np.inf)) if query.traced else 0
        mark = self._stage(ranking, "score", mark, eligible, scored)

        ranking.selection = self._select(ranking)
        mark = self._stage(ranking, "rank", mark, scored, len(ranking.selection.rows_K))

        if query.explained:
            self._explain(ranking)
            self._stage(
                ranking, "reasons", mark, len(ranking.selection.rows_K), len(ranking.selection.rows_K)
            )
        self._note_missing(ranking)
        return ranking

    def assemble(self, ranking: Ranking) -> Answer:
        """Returns the answer of a finished ranking."""
        mark = self._clock.monotonic()
        query, world, selection, scores = ranking.query, ranking.world, ranking.selection, ranking.scores
        rows_K = selection.rows_K
        model = world.model
        digests_K = world.index.digests(world.size)[rows_K]
        version = model.version if model is not None else ""
        shown = query.page.offset + len(rows_K)
        next_page = None
        if selection.has_more and len(rows_K) and shown < MAX_PAGED_ITEMS:
            next_page = Page(
                offset=shown,
                model_version=version,
                seed=ranking.seed or query.page.seed or query.seed,
                shown_digests=np.concatenate([query.page.shown_digests, digests_K.astype(np.uint32)]),
            )
        attribution = AttributionToken(
            recommendation_id=self._new_id(),
            issued_at_ms=int(ranking.now * 1000),
            placement=query.placement,
            serving_config=ranking.config.serving_config_id,
            model_version=version,
            variant=query.variant,
            item_digests_K=digests_K,
            propensities_K=(
                np.ones(len(rows_K), dtype=np.float32)
                if ranking.propensities_K is None
                else ranking.propensities_K
            ),
        )
        records: list[object | None] = []
        if query.with_records:
            records = world.catalog.records_of(rows_K.tolist())
        for degradation in ranking.degraded:
            self._observer.degraded(degradation.cause.name)
        expected_K, counts_K = self._purchases(ranking)
        self._stage(ranking, "token", mark, len(rows_K), len(rows_K))
        self._observer.stages(ranking.timings)
        verdict_counts: list[tuple[Verdict, int]] = []
        if query.traced:
            verdict_counts = ranking.eligibility.counts(scores.score_R > -np.inf)
        return Answer(
            index=world.index,
            rows_K=rows_K,
            scores_K=selection.scores_K,
            records=records,
            reasons=ranking.reasons,
            first_position=query.page.offset + 1,
            expected_K=expected_K,
            purchase_counts_K=counts_K,
            attribution=attribution,
            model_name=model.name if model is not None else "",
            model_version=version,
            catalog_version=world.catalog.version,
            config=ranking.config,
            variant=query.variant,
            degraded=ranking.degraded,
            freshness=ranking.freshness,
            next_page=next_page,
            stages=ranking.stages if query.traced else (),
            verdict_counts=verdict_counts,
            sources=scores.sources,
        )

    def _stage(
        self, ranking: Ranking, name: str, since: float, before: int, after: int, detail: str = ""
    ) -> float:
        now = self._clock.monotonic()
        ranking.timings.append((name, now - since))
        if ranking.query.traced:
            ranking.stages.append(Stage(name, now - since, before, after, detail))
        return now

    def _remaining(self, ranking: Ranking) -> float:
        return ranking.deadline - self._clock.monotonic()

    def _read_history(self, ranking: Ranking) -> None:
        query, index, now = ranking.query, ranking.world.index, ranking.now
        if query.user_key is not None:
            reading = self._histories.read(
                query.user_key, query.consistency, query.consistency_text, ranking.deadline
            )
            ranking.history = reading.history
            ranking.degraded += reading.degraded
            ranking.freshness = self._histories.freshness(reading)
        events = list(query.context_events)
        if query.context_item_id:
            events.append(ContextEvent(query.context_item_id, EventKind.ITEM_VIEW))
        if query.kind is ListKind.CART:
            events += [ContextEvent(item, EventKind.ADD_TO_CART) for item in query.item_ids[-_CART_EVENTS:]]
        if events:
            ranking.history = ranking.history.followed_by(_as_history(events, index, now))

    def _score(self, ranking: Ranking) -> Scores:
        world, query, history, now = ranking.world, ranking.query, ranking.history, ranking.now
        model = world.model
        match query.kind:
            case ListKind.TRENDING:
                return trending_scores(world, self._counts, query.window_seconds, now)
            case ListKind.BUY_AGAIN:
                return buy_again(world, history, now)
            case ListKind.SIMILAR:
                return self._similar(ranking, query.item_ids[0])
            case ListKind.TOGETHER:
                if model is None:
                    nothing_R = np.full(world.size, -np.inf, dtype=np.float32)
                    missing = Degradation(Cause.NO_MODEL, "no model is in service; nothing is known together")
                    return Scores(nothing_R, [Source.COOCCURRENCE], degraded=[missing])
                indices = model.indices_of(rows_of(world, query.item_ids))
                return together_scores(world, model, np.unique(indices[indices >= 0]))
        if ranking.config.scorer is Scorer.ITEM_TO_ITEM and model is not None and len(history):
            indices_N = model.indices_of(history.rows_N)
            known = np.flatnonzero(indices_N >= 0)
            if len(known):
                return similar_scores(world, model, int(indices_N[known[-1]]))
        if ranking.config.scorer is Scorer.COSINE and model is not None and len(history):
            return cosine_scores(world, model, history, self._counts, now, ranking.config.cosine_alpha)
        if ranking.config.scorer is Scorer.BLENDED and model is not None and len(history):
            may_encode = self._remaining(ranking) > _ENCODE_SECONDS
            # A trace shows every item's place, and takes the time that a pass over all takes.
            if model.is_searched and may_encode and not query.traced:
                return self._searched(ranking, model)
            return blended_scores(world, model, history, self._counts, now, may_encode=may_encode)
        return popular_scores(world, self._counts, now)

    def _searched(self, ranking: Ranking, model: Model) -> Scores:
        query, plan = ranking.query, ranking.plan
        count = query.page_size or ranking.policy.default_page_size
        wanted = query.page.offset + max(count, ranking.config.diversity_depth) + _BEHIND_THE_PAGE
        moved_R = np.zeros(ranking.world.size, dtype=np.bool_)
        if plan is not None:
            # What a rule moves up, or wants a share of, may be far from what a search would find.
            for _, mask_R, amount in plan.shifts:
                if amount > 0:
                    moved_R |= mask_R
            for _, mask_R, _ in plan.shares:
                moved_R |= mask_R
        return searched_scores(
            ranking.world,
            model,
            ranking.history,
            self._counts,
            ranking.now,
            ranking.eligibility.eligible_R,
            wanted,
            np.flatnonzero(moved_R & ranking.eligibility.eligible_R).astype(np.int32)[:_MOST_MOVED],
        )

    def _similar(self, ranking: Ranking, item_id: str) -> Scores:
        world = ranking.world
        row = world.index.row_of(item_id)
        if row is None or row >= world.size or not world.knows(row):
            raise NotFound(
                "ITEM_NOT_FOUND",
                "Neither the catalogue nor the model in service knows this item; upsert it first.",
                {"itemId": item_id},
            )
        model = world.model
        index = -1 if model is None else int(model.indices_of(np.array([row], np.int32))[0])
        if model is not None and index >= 0:
            return similar_scores(world, model, index)
        scores = popular_scores(world, self._counts, ranking.now)
        category = world.catalog.category_of(row)
        if category:
            peers = world.catalog.posting(("category", category)).rows
            peers = peers[scores.score_R[peers] > -np.inf]
            if len(peers):
                in_category_R = np.full(world.size, -np.inf, dtype=np.float32)
                in_category_R[peers] = scores.score_R[peers]
                scores.score_R = in_category_R
        if model is not None:
            scores.degraded.append(
                Degradation(Cause.ITEM_UNKNOWN_TO_MODEL, "the item is newer than the model in service")
            )
        return scores

    def _judge(self, ranking: Ranking, filter_R: np.ndarray | None) -> Eligibility:
        world, query, policy = ranking.world, ranking.query, ranking.policy
        about = [*query.item_ids] if query.kind is not ListKind.CART else []
        if query.context_item_id:
            about.append(query.context_item_id)
        cart = [*query.cart_item_ids, *(query.item_ids if query.kind is ListKind.CART else ())]
        owned = np.empty(0, dtype=np.int32)
        if policy.exclude_owned and query.kind is not ListKind.BUY_AGAIN:
            owned = rows_within(world, ranking.history.owned_rows())
        excluded = np.concatenate(
            [rows_of(world, query.exclude_item_ids), shown_rows(world, query.page.shown_digests)]
        )
        seen = np.empty(0, dtype=np.int32)
        if policy.unseen_first and query.kind in _PERSONAL:
            seen = rows_within(world, ranking.history.seen_rows())
        exclusions = Exclusions(
            seen=seen,
            excluded=excluded,
            in_cart=rows_of(world, cart) if policy.exclude_in_cart else np.empty(0, dtype=np.int32),
            owned=owned,
            context=rows_of(world, about),
        )
        return judge(
            world,
            exclusions,
            filter_R=filter_R,
            respects_stock=policy.exclude_out_of_stock,
            now=ranking.now,
            policy_R=self._filters.mask(policy.filter_text, world.catalog) if policy.filter_text else None,
            ruled_out_R=ranking.plan.ruled_out(world.size) if ranking.plan is not None else None,
        )

    def _select(self, ranking: Ranking) -> Selection:
        world, query, config, scores = ranking.world, ranking.query, ranking.config, ranking.scores
        eligibility = ranking.eligibility
        count = min(query.page_size or ranking.policy.default_page_size, MAX_PAGE_SIZE)
        count = min(count, MAX_PAGED_ITEMS - query.page.offset)
        personal = query.kind in _PERSONAL
        by_vectors = scores.model_history is not None or scores.sources == [Source.COSINE]
        if personal and by_vectors and config.diversity_strength > 0:
            if self._remaining(ranking) > _DIVERSITY_SECONDS:
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
        further = _BEHIND_THE_PAGE if explores or (plan is not None and plan.arranges) else 0
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

    def _explain(self, ranking: Ranking) -> None:
        selection = ranking.selection
        if self._remaining(ranking) < _EXPLANATION_SECONDS:
            ranking.degraded.append(
                Degradation(Cause.DEADLINE_EXPLANATIONS_SKIPPED, "left out to keep the deadline")
            )
            return
        ranking.reasons = self.reasons_of(ranking, selection.rows_K, selection.tiers_K)

    def reasons_of(self, ranking: Ranking, rows_K: np.ndarray, tiers_K: np.ndarray) -> list[list[Reason]]:
        """Returns the reasons of rows, each of a tier of the ranking."""
        tiers = ranking.tiers
        values_K = np.array(
            [tiers[tier].score_R[row] for row, tier in zip(rows_K, tiers_K, strict=True)], dtype=np.float32
        )
        sources_K = [tiers[tier].source for tier in tiers_K]
        if ranking.scores.model_history is not None and ranking.scores.logits_I is None:
            # The prior that stood in for the encoder is no count.
            sources_K = [Source.COOCCURRENCE if tier == 0 else tiers[tier].source for tier in tiers_K]
        found = reasons_for(ranking.world, ranking.scores, ranking.history, rows_K, sources_K, values_K)
        if ranking.plan is None and not ranking.explored:
            return found
        return [
            [*self._reasons_of_shop(ranking, int(row)), *reasons]
            for row, reasons in zip(rows_K, found, strict=True)
        ]

    @staticmethod
    def _reasons_of_shop(ranking: Ranking, row: int) -> list[Reason]:
        """Returns what rules and exploration did for an item; it comes before what the item itself did."""
        if row in ranking.explored:
            return [Reason(ReasonKind.EXPLORATION, "Shown to learn how it does")]
        if ranking.plan is None:
            return []
        contributions = ranking.plan.contributions(row)
        return [
            Reason(ReasonKind.RULE, "Chosen by the shop", contribution=added, rule_id=rule_id)
            for rule_id, added in contributions.items()
        ]

    def _note_missing(self, ranking: Ranking) -> None:
        query, world, selection = ranking.query, ranking.world, ranking.selection
        state = self._catalog_stream.state()
        heard = state.last_message_time
        if not state.complete:
            ranking.degraded.append(
                Degradation(
                    Cause.CATALOG_UNAVAILABLE,
                    "the catalogue has not arrived yet"
                    + (f": {state.last_error}" if state.last_error else ""),
                )
            )
        elif not state.connected and (heard is None or ranking.now - heard > STALE_AFTER_SECONDS):
            ranking.degraded.append(
                Degradation(Cause.CATALOG_STALE, f"the catalogue's stream: {state.last_error}")
            )
        history = ranking.history
        ranking.freshness = Freshness(
            watermark=ranking.freshness.watermark,
            watermark_time=ranking.freshness.watermark_time,
            newest_event_time=float(history.times_N[-1]) if len(history) else None,
            events_used=len(history),
            catalog_time=heard if state.complete else None,
        )
        config = ranking.config
        if (config.model or config.model_alias) and self._worlds.other(
            config.model, config.model_alias
        ) is None:
            ranking.degraded.append(
                Degradation(
                    Cause.NO_MODEL,
                    f"alias {config.model_alias or 'production'} of model {config.model or 'main'} has no version "
                    "in service; the service's own answers",
                )
            )
        model_version = world.model.version if world.model is not None else ""
        if query.page.offset and query.page.model_version != model_version:
            ranking.degraded.append(
                Degradation(
                    Cause.SNAPSHOT_CHANGED,
                    "the model changed since the page before; this page is of the new one",
                )
            )
        if not len(selection.rows_K) and world.model is None and not len(world.catalog.items):
            ranking.degraded.append(Degradation(Cause.NO_ITEMS, "no model, no catalogue, no events"))

    def _purchases(self, ranking: Ranking) -> tuple[np.ndarray | None, np.ndarray | None]:
        scores, selection = ranking.scores, ranking.selection
        if scores.purchases is None:
            return None, None
        purchases = scores.purchases
        places_K = np.searchsorted(purchases.rows_P, selection.rows_K)
        return (
            purchases.newest_P[places_K] + purchases.interval_P[places_K],
            purchases.counts_P[places_K],
        )


def _as_history(events: Sequence[ContextEvent], index: ItemIndex, now: float) -> History:
    """Returns context events as a history; items that nobody has heard of are skipped.

    They are not given rows: a caller could fill the memory with ids of its own making.
    """
    known = [(row, event) for event in events if (row := index.row_of(event.item_id)) is not None]
    if not known:
        return NO_HISTORY
    times = np.array([now if event.time is None else event.time for _, event in known])
    order = np.argsort(times, kind="stable")
    return History(
        np.array([row for row, _ in known], dtype=np.int32)[order],
        np.array([event.kind for _, event in known], dtype=np.int32)[order],
        times[order],
    )
