"""Files into the catalogue: begun, followed, cancelled, and run one after another by one replica."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from services.profile.domain.item_imports import ItemImport, ItemImportProgress
from services.profile.domain.items import WriteStatus
from services.profile.ports import ItemFiles, ItemImportStore
from services.profile.use_cases.catalogue import Catalogue
from shared.errors import ShopkeeperError, Unavailable
from shared.operations import OperationState, follow


class ManageItemImports:
    """Begins, follows and cancels imports."""

    def __init__(
        self, store: ItemImportStore, files: ItemFiles, clock_us: Callable[[], int], wake: Callable[[], None]
    ) -> None:
        self._store = store
        self._files = files
        self._clock_us = clock_us
        self._wake = wake
        self.get = store.get
        self.page = store.page

    def begin(self, source: bytes, request_id: str, write_time_us: int) -> ItemImport:
        """Returns a new import, or the earlier one of the same request id.

        Raises:
            InvalidInput: the file is not there, cannot be read, or its columns do not fit.
        """
        self._files.check(source)
        created = self._store.create(source, request_id, write_time_us, self._clock_us())
        self._wake()
        return created

    def cancel(self, import_id: str) -> ItemImport:
        """Stops an import; raises NotFound."""
        return self._store.request_cancel(import_id, self._clock_us())

    def watch(
        self, import_id: str, stopped: threading.Event, is_active: Callable[[], bool]
    ) -> Iterator[ItemImport]:
        """Yields an import now, after each change, and for the last time when it has ended."""
        return follow(lambda: self._store.get(import_id), stopped, is_active)


class RunItemImports:
    """Brings files into the catalogue, through the same door as every write."""

    def __init__(
        self,
        store: ItemImportStore,
        files: ItemFiles,
        catalogue: Catalogue,
        clock_us: Callable[[], int],
        stopped: threading.Event,
    ) -> None:
        self._store = store
        self._files = files
        self._catalogue = catalogue
        self._clock_us = clock_us
        self._stopped = stopped

    def run_next(self) -> bool:
        """Runs the oldest unfinished import to its end; returns whether there was one.

        One that was cut short begins again: its writes carry the same time, so what was stored stays stored.

        Raises:
            Unavailable: the database is away; nothing is lost.
        """
        job = self._store.oldest_unfinished()
        if job is None:
            return False
        progress = ItemImportProgress()
        try:
            if not self._store.checkpoint(job.import_id, progress):
                return self._end(job, OperationState.CANCELLED)
            for part in self._files.parts(job.source, job.write_time_us):
                if self._stopped.is_set():
                    return True
                results = self._catalogue.write(part.writes)
                stored = sum(result.status == WriteStatus.STORED for result in results)
                progress = progress.after(part, stored, len(results) - stored)
                if not self._store.checkpoint(job.import_id, progress):
                    return self._end(job, OperationState.CANCELLED)
                if part.damage:
                    return self._end(job, OperationState.FAILED, "IMPORT_REFUSED", part.damage)
        except Unavailable:
            raise
        except ShopkeeperError as error:
            return self._end(job, OperationState.FAILED, error.reason, error.message)
        return self._end(job, OperationState.SUCCEEDED)

    def _end(self, job: ItemImport, state: OperationState, reason: str = "", message: str = "") -> bool:
        self._store.finish(job.import_id, state, reason, message, self._clock_us())
        return True
