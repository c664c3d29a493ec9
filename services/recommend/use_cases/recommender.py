"""The pipeline: history, eligibility, scores, order, reasons, token.

Every stage works on arrays over the whole catalogue; Python objects are made for
the items of the page alone. The first thing that a request does is to take one
`World`; model and catalogue may change behind it, the answer does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from services.recommend.domain.live_counts import LiveCounts
from services.recommend.domain.recommendation import Answer, Query
from services.recommend.domain.rules import Rule
from services.recommend.ports import CatalogStream, Clock, Experiments, FilterParser, Observer
from services.recommend.use_cases.configs import ServingConfigs
from services.recommend.use_cases.eligibility import FilterMasks
from services.recommend.use_cases.histories import HistoryReader
from services.recommend.use_cases.ranking import Ranking, Snapshot
from services.recommend.use_cases.rules import plan_rules
from services.recommend.use_cases.shadow import Shadow
from services.recommend.use_cases.stages.answer import assemble, note_missing
from services.recommend.use_cases.stages.choose import Choosing
from services.recommend.use_cases.stages.explain import explain_page
from services.recommend.use_cases.stages.history import read_history
from services.recommend.use_cases.stages.judge import judge_items
from services.recommend.use_cases.stages.score import Scoring
from services.recommend.use_cases.stages.second import rank_again
from services.recommend.use_cases.world import Worlds
from shared.experiments import assign

_SHADOW_SECONDS = 5.0


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
        self._scoring = Scoring(counts)
        self._choosing = Choosing(counts, new_id)
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
            clock=self._clock,
        )
        rules = configuration.rules_of(config) if rules is None else rules
        # A filter that does not parse fails before any waiting.
        filter_R = self._filters.mask(query.filter_text, ranking.world.catalog) if query.filter_text else None

        read_history(ranking, self._histories)
        if query.consistency is not None and snapshot is None:
            # Waiting takes time in which a model or the catalogue may have changed: take the newest.
            ranking.world = self._worlds.of(config)
            if query.filter_text:
                filter_R = self._filters.mask(query.filter_text, ranking.world.catalog)
        mark = ranking.mark("profile", started, len(ranking.history), len(ranking.history))

        # Before the scores: a search asks for more where little of what it finds may be shown.
        if rules:
            ranking.plan = plan_rules(rules, query.placement, ranking.now, ranking.world, self._filters)
        ranking.eligibility = judge_items(ranking, self._filters, filter_R)
        # Counting takes passes over the catalogue, and interests nobody who has not asked.
        eligible = int(np.count_nonzero(ranking.eligibility.eligible_R)) if query.traced else 0
        mark = ranking.mark("filter", mark, ranking.world.size, eligible)

        ranking.scores = scores = self._scoring.score(ranking)
        ranking.degraded += scores.degraded
        scored = int(np.count_nonzero(scores.score_R > -np.inf)) if query.traced else 0
        detail = ", ".join(
            f"{part.source.name.lower()} {part.weight:g} x {len(part.rows)} candidates"
            + (f" in {part.segment}" if part.segment else "")
            for part in scores.parts
        )
        if scores.in_segment_R is not None:
            detail = f"popular_in_segment in {scores.segment}"
        mark = ranking.mark("score", mark, eligible, scored, detail)

        if ranked_again := rank_again(ranking):
            mark = ranking.mark("second_stage", mark, ranked_again, ranked_again)

        ranking.selection = self._choosing.choose(ranking)
        mark = ranking.mark("rank", mark, scored, len(ranking.selection.rows_K))

        if query.explained:
            explain_page(ranking)
            ranking.mark("reasons", mark, len(ranking.selection.rows_K), len(ranking.selection.rows_K))
        note_missing(ranking, self._catalog_stream, self._worlds)
        return ranking

    def assemble(self, ranking: Ranking) -> Answer:
        """Returns the answer of a finished ranking."""
        answer = assemble(ranking, self._new_id())
        for degradation in ranking.degraded:
            self._observer.degraded(degradation.cause.name)
        self._observer.stages(ranking.timings)
        return answer
