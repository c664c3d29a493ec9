"""The answer, its token, and what it went without."""

from __future__ import annotations

import numpy as np

from services.recommend.domain.recommendation import Answer, Cause, Degradation, Freshness, Page, Verdict
from services.recommend.ports import CatalogStream
from services.recommend.use_cases.histories import STALE_AFTER_SECONDS
from services.recommend.use_cases.ranking import MAX_PAGED_ITEMS, Ranking
from services.recommend.use_cases.world import Worlds
from shared.tokens import AttributionToken


def assemble(ranking: Ranking, recommendation_id: bytes) -> Answer:
    """Returns the answer of a finished ranking."""
    mark = ranking.clock.monotonic()
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
        recommendation_id=recommendation_id,
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
    expected_K, counts_K = _purchases(ranking)
    ranking.mark("token", mark, len(rows_K), len(rows_K))
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


def note_missing(ranking: Ranking, catalog_stream: CatalogStream, worlds: Worlds) -> None:
    """Puts what the answer went without, and how fresh it is, into the ranking."""
    query, world, selection = ranking.query, ranking.world, ranking.selection
    state = catalog_stream.state()
    heard = state.last_message_time
    if not state.complete:
        ranking.degraded.append(
            Degradation(
                Cause.CATALOG_UNAVAILABLE,
                "the catalogue has not arrived yet" + (f": {state.last_error}" if state.last_error else ""),
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
    if (config.model or config.model_alias) and worlds.other(config.model, config.model_alias) is None:
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


def _purchases(ranking: Ranking) -> tuple[np.ndarray | None, np.ndarray | None]:
    scores, selection = ranking.scores, ranking.selection
    if scores.purchases is None:
        return None, None
    purchases = scores.purchases
    places_K = np.searchsorted(purchases.rows_P, selection.rows_K)
    return (
        purchases.newest_P[places_K] + purchases.interval_P[places_K],
        purchases.counts_P[places_K],
    )
