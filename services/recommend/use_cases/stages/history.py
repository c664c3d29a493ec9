"""What the shopper did, and does right now."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.recommend.domain.history import NO_HISTORY, History
from services.recommend.domain.item_index import ItemIndex
from services.recommend.domain.recommendation import ContextEvent, ListKind
from services.recommend.use_cases.histories import HistoryReader
from services.recommend.use_cases.ranking import Ranking
from shared.event_kinds import EventKind

_CART_EVENTS = 100


def read_history(ranking: Ranking, histories: HistoryReader) -> None:
    """Puts the shopper's events, and those of the request, into the ranking; raises as `HistoryReader.read`."""
    query, index, now = ranking.query, ranking.world.index, ranking.now
    if query.user_key is not None:
        reading = histories.read(query.user_key, query.consistency, query.consistency_text, ranking.deadline)
        ranking.history = reading.history
        ranking.segments = reading.segments
        ranking.degraded += reading.degraded
        ranking.freshness = histories.freshness(reading)
    events = list(query.context_events)
    if query.context_item_id:
        events.append(ContextEvent(query.context_item_id, EventKind.ITEM_VIEW))
    if query.kind is ListKind.CART:
        events += [ContextEvent(item, EventKind.ADD_TO_CART) for item in query.item_ids[-_CART_EVENTS:]]
    if events:
        ranking.history = ranking.history.followed_by(_as_history(events, index, now))


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
