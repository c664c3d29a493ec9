"""Removes model versions that are older than the retention: what they learned of the forgotten goes with them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from shared.bundle import Registry
from shared.errors import ShopkeeperError

_TICK_SECONDS = 3_600.0


class Retirement:
    """A thread that removes versions which no alias names and which are old enough.

    Args:
        retention_days: since they were made; 0 keeps them for ever.
    """

    def __init__(
        self,
        registry: Registry,
        retention_days: int,
        logger: Any,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._registry, self._days, self._logger, self._now = registry, retention_days, logger, now
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="retirement", daemon=True)

    def start(self) -> None:
        """Starts the thread, if there is anything to do ever."""
        if self._days:
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def run(self) -> list[tuple[str, str]]:
        """Removes what is due; returns (model, version) of it."""
        retired = []
        for model, version in self._registry.versions():
            try:
                created_at = datetime.fromisoformat(
                    self._registry.read_manifest(model, version)["created_at"]
                )
                if created_at.tzinfo is None:
                    created_at = created_at.replace(tzinfo=UTC)
                if created_at + timedelta(days=self._days) <= self._now() and self._retire(model, version):
                    retired.append((model, version))
            except (ShopkeeperError, OSError, KeyError, TypeError, ValueError) as error:
                self._logger.warning(
                    "model version not retired", model=model, version=version, cause=repr(error)
                )
        return retired

    def _retire(self, model: str, version: str) -> bool:
        gone = self._registry.retire(model, version)
        if gone:
            self._logger.info("model version retired", model=model, version=version)
        return gone

    def _loop(self) -> None:
        while True:
            try:
                self.run()
            except Exception as error:
                # The thread must live: without it the promise of the receipts is broken.
                self._logger.error("retirement failed", exc_info=error)
            if self._stopping.wait(_TICK_SECONDS):
                return
