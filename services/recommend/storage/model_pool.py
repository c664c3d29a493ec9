"""The models in service: the service's own, and those that serving configs name beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from services.recommend.domain.status import ModelState
from services.recommend.storage.models import ModelWatcher


class ModelPool:
    """Follows an alias for as long as somebody names it. Implements `ports.Models`.

    Args:
        own: follows the service's own model.
        model, alias: its names.
        make: makes a watcher of a (model, alias).
    """

    def __init__(
        self, own: ModelWatcher, model: str, alias: str, make: Callable[[str, str], ModelWatcher]
    ) -> None:
        self._own = own
        self._model, self._alias = model, alias
        self._make = make
        self._lock = threading.Lock()
        self._others: dict[tuple[str, str], ModelWatcher] = {}

    def source(self, model: str, alias: str) -> ModelWatcher | None:
        if not model and not alias:
            return self._own
        return self._others.get(self._named(model, alias), self._own if self._is_own(model, alias) else None)

    def states(self) -> list[ModelState]:
        return [self._own.state(), *(watcher.state() for watcher in list(self._others.values()))]

    def follow(self, named: Iterable[tuple[str, str]]) -> None:
        """Follows these beside the service's own, and no others. Returns at once; they load on threads of theirs."""
        wanted = {self._named(model, alias) for model, alias in named if not self._is_own(model, alias)}
        with self._lock:
            for key in self._others.keys() - wanted:
                # Whoever answers from it at this moment holds its arrays until done.
                self._others.pop(key).stop_soon()
            for key in wanted - self._others.keys():
                self._others[key] = watcher = self._make(*key)
                watcher.start_in_background()

    def stop(self) -> None:
        """Ends the following of all."""
        self.follow(())
        self._own.stop()

    def _named(self, model: str, alias: str) -> tuple[str, str]:
        return model or self._model, alias or self._alias

    def _is_own(self, model: str, alias: str) -> bool:
        return self._named(model, alias) == (self._model, self._alias)
