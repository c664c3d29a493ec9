"""What the log says of the catalogue."""

from __future__ import annotations

from services.feedback.domain.unknown_items import UnknownItemOrder, UnknownItemsPage
from services.feedback.ports import UnknownItemStore


class ReportUnknownItems:
    """Lists the items that events name and the catalogue does not know."""

    def __init__(self, store: UnknownItemStore) -> None:
        self._store = store

    def page(self, order: UnknownItemOrder, after: tuple[int, str] | None, limit: int) -> UnknownItemsPage:
        """Returns at most `limit` items that come after a (number of events, id)."""
        return self._store.page(order, after, limit)
