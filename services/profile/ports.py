"""What the use cases need of the world."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from services.profile.domain.churn_model import ChurnModel
from services.profile.domain.content_space import ContentSpace
from services.profile.domain.events import EventBatch, EventWindow
from services.profile.domain.item_figures import Baskets, ItemCounts
from services.profile.domain.item_imports import (
    ItemImport,
    ItemImportProgress,
    ItemPart,
)
from services.profile.domain.item_portrait import Vector
from services.profile.domain.items import Item, ItemFilter, ItemWrite, WriteResult
from services.profile.domain.purchase_log import PurchaseLog
from services.profile.domain.rebuilds import FoldedShopper, Rebuild
from services.profile.domain.segments import Segment, SegmentChange
from shared.identity import UserKey
from shared.operations import OperationState
from shared.tokens import Watermark


@dataclass(frozen=True, slots=True)
class LogChanges:
    """What was committed to the log between two snapshots.

    Attributes:
        watermark: how far who has read this is; the later snapshot's durable part.
        snapshot: the later snapshot.
        events: what is new; empty when `overflow`.
        reconsented: shoppers whose consent changed; their windows must be loaded anew.
        erased: shoppers who were erased, for ever. Their rows may be there a while longer.
        overflow: more is new than was asked for, so that nothing of it was read.
        merged: ids that stand for another shopper, who is None once erased.
    """

    watermark: Watermark
    snapshot: Watermark
    events: EventBatch
    reconsented: Sequence[UserKey] = ()
    erased: Sequence[UserKey] = ()
    overflow: bool = False
    merged: Sequence[tuple[UserKey, UserKey | None]] = ()


@dataclass(frozen=True, slots=True)
class ChangedUsers:
    """Who changed since a snapshot. `None` for `changed`: too many, or the snapshot is not of this log."""

    changed: Sequence[UserKey] | None
    erased: Sequence[UserKey] = ()


class EventLog(Protocol):
    """The behaviour log as feedback publishes it. Methods may be called from any thread.

    All raise Unavailable (`LOG_UNAVAILABLE`, `DATABASE_UNAVAILABLE`) when the log cannot be read.
    """

    def poll(self, since: Watermark | None, max_events: int) -> LogChanges:
        """Returns what was committed since a snapshot, each event exactly once.

        For None: no events, and everybody who was ever erased.
        A commit that was in progress in `since` is returned by the poll that first sees it.
        """
        ...

    def load(self, user_keys: Sequence[UserKey]) -> dict[UserKey, EventWindow]:
        """Returns the windows of shoppers by one query; who has no events is missing.

        The events of whoever was merged into them are theirs.
        """
        ...

    def changed_since(self, since: Watermark, max_users: int) -> ChangedUsers:
        """Returns who changed, or was erased, since a snapshot that another replica may have taken."""
        ...


@dataclass(frozen=True, slots=True)
class Merge:
    """Two ids are one shopper.

    Attributes:
        user_key: stands for both.
        merged_event_count: events of the id that was anonymous.
        xid: the transaction from which on it is so.
    """

    user_key: UserKey
    merged_event_count: int
    xid: int


class Merges(Protocol):
    """Which ids stand for one shopper, durable. Raises Unavailable when the database does not answer."""

    def merge(self, anonymous: UserKey, known: UserKey) -> Merge:
        """Makes one id stand for both; repeating it changes nothing.

        Raises:
            FailedPrecondition: the anonymous one has become another shopper, one of them was erased, or too
                many have become this shopper.
        """
        ...


@dataclass(frozen=True, slots=True)
class StoredItem:
    """An item as stored, and the transaction that wrote it last."""

    item: Item
    xid: int


@dataclass(frozen=True, slots=True)
class CatalogueChanges:
    """What was committed to the catalogue between two snapshots; `items` include deleted ones."""

    watermark: Watermark
    items: Sequence[StoredItem]


class CatalogueStore(Protocol):
    """The catalogue as stored. Methods may be called from any thread.

    All raise Unavailable when the database does not answer.
    """

    def write(self, writes: Sequence[ItemWrite]) -> list[WriteResult]:
        """Applies writes in one transaction, field by field where they are not older; one result each."""
        ...

    def get(self, item_id: str) -> Item | None:
        """Returns an item that is not deleted, with its picture."""
        ...

    def page(self, item_filter: ItemFilter, after_item_id: str, limit: int) -> list[Item]:
        """Returns items behind an id in the order of ids, without `image_bytes`."""
        ...

    def load(self) -> Iterator[CatalogueChanges]:
        """Yields everything, deleted items included, in chunks of one snapshot."""
        ...

    def poll(self, since: Watermark) -> CatalogueChanges:
        """Returns what was committed since a snapshot, without `image_bytes`."""
        ...

    def announce(self) -> None:
        """Wakes the readers of every replica soon. Never fails: they also poll."""
        ...


@dataclass(frozen=True, slots=True)
class PurchaseHistory:
    """What was bought and sent back.

    Attributes:
        user_keys: by the numbers that the log gives shoppers, ascending.
        currency_code: that of most lines; lines in another one are worth 0 in the log.
    """

    log: PurchaseLog
    user_keys: Sequence[bytes]
    currency_code: str


class Purchases(Protocol):
    """Everybody's purchases. Raises Unavailable when the log cannot be read."""

    def read(self, *, for_training: bool, before_us: int) -> PurchaseHistory:
        """Returns lines that happened before a time.

        Args:
            for_training: of those who consent to training; otherwise of those who consent to be served
                personally.
        """
        ...


class ChurnModels(Protocol):
    """Where churn models are published."""

    def current_version(self) -> str | None:
        """Returns the version in production, or None."""
        ...

    def load(self, version: str) -> ChurnModel:
        """Returns a model; raises DataLoss when any digest, signature, shape or number does not fit."""
        ...


@dataclass(frozen=True, slots=True)
class StoredAlert:
    """A rise of one shopper's probability over at least one whole percent."""

    alert_id: int
    user_key: UserKey
    previous_probability: float
    probability: float
    model_version: str
    time_us: int


class ChurnAlerts(Protocol):
    """Rises of probabilities, durable. All raise Unavailable when the database does not answer."""

    def record(
        self,
        user_keys: Sequence[bytes],
        probabilities: Sequence[float],
        horizon_days: int,
        model_version: str,
    ) -> int:
        """Compares with what was recorded before, stores rises, and returns how many there are.

        A shopper who is new makes no alert. Replicas that record the same make one alert.
        """
        ...

    def after(
        self, alert_id: int, horizon_days: int, threshold: float, limit: int
    ) -> tuple[int, list[StoredAlert]]:
        """Returns crossings of a threshold behind an id, and the id up to which all are told."""
        ...

    def newest(self) -> int:
        """Returns the id of the newest alert, or 0."""
        ...

    def erase_forgotten(self) -> list[UserKey]:
        """Removes whoever was erased, and returns everybody who ever was."""
        ...


class SegmentStore(Protocol):
    """Segments as stored. All raise Unavailable when the database does not answer."""

    def create(self, segment: Segment, request_id: str) -> Segment:
        """Stores a segment; with a request id that was used, returns what the first call made.

        Raises:
            AlreadyExists: the id is taken.
        """
        ...

    def get(self, segment_id: str, version: int = 0) -> Segment:
        """Returns a segment, as of a version or the newest; raises NotFound."""
        ...

    def page(self, after_segment_id: str, limit: int) -> list[Segment]:
        """Returns segments behind an id, by ascending id."""
        ...

    def update(self, change: SegmentChange) -> Segment:
        """Applies a change; another filter makes a new version. Raises NotFound, Aborted."""
        ...

    def delete(self, segment_id: str, revision: int | None) -> None:
        """Deletes a segment with its versions; raises NotFound, Aborted."""
        ...

    def users_after(self, user_key: bytes, limit: int) -> tuple[list[UserKey], bytes | None]:
        """Returns shoppers of the log behind a key, ascending, and the key to go on behind; None at the end.

        Those who were erased are left out, and so there may be fewer than `limit` before the end.
        """
        ...


class Metrics(Protocol):
    """What is counted."""

    def polled(self, event_count: int, seconds: float) -> None:
        """A poll of the log succeeded."""
        ...

    def hot(self, user_count: int) -> None:
        """So many shoppers are in memory."""
        ...

    def missed(self, user_count: int) -> None:
        """So many shoppers had to be loaded from the log."""
        ...

    def watchers(self, stream: str, count: int) -> None:
        """So many clients watch a stream."""
        ...

    def alerted(self, user_count: int) -> None:
        """So many shoppers are more likely to leave than before."""
        ...


class ItemFiles(Protocol):
    """Files of items below the service's import directory."""

    def check(self, source: bytes) -> None:
        """Raises InvalidInput where the file is not there, cannot be read, or its columns do not fit."""
        ...

    def parts(self, source: bytes, write_time_us: int) -> Iterator[ItemPart]:
        """Yields the rows from the first, in the same parts each time; raises as `check` does."""
        ...


class ItemImportStore(Protocol):
    """Imports as stored. All raise Unavailable when the database does not answer."""

    def create(self, source: bytes, request_id: str, write_time_us: int, now_us: int) -> ItemImport:
        """Stores a new import, or returns the one of the same request id."""
        ...

    def get(self, import_id: str) -> ItemImport:
        """Returns an import; raises NotFound."""
        ...

    def page(self, after: tuple[int, str] | None, limit: int) -> list[ItemImport]:
        """Returns imports, the newest first, behind a time of creation and an id."""
        ...

    def oldest_unfinished(self) -> ItemImport | None:
        """Returns the import whose turn it is."""
        ...

    def checkpoint(self, import_id: str, progress: ItemImportProgress) -> bool:
        """Stores how far a running import has come; returns whether it is to go on."""
        ...

    def finish(self, import_id: str, state: OperationState, reason: str, message: str, now_us: int) -> None:
        """Ends an import; does nothing to one that has ended."""
        ...

    def request_cancel(self, import_id: str, now_us: int) -> ItemImport:
        """Asks an import to stop; raises NotFound."""
        ...


class RebuildStore(Protocol):
    """Rebuilds, and what they folded. All raise Unavailable when the database does not answer."""

    def create(self, request_id: str, now_us: int) -> Rebuild:
        """Stores a new rebuild, or returns the one of the same request id."""
        ...

    def get(self, rebuild_id: str) -> Rebuild:
        """Returns a rebuild; raises NotFound."""
        ...

    def oldest_unfinished(self) -> Rebuild | None:
        """Returns the rebuild whose turn it is."""
        ...

    def begin(self, rebuild_id: str) -> Watermark:
        """Starts a rebuild from nothing, counts the log, and returns the snapshot from which on readers go on."""
        ...

    def users_after(self, user_key: bytes, limit: int) -> tuple[list[UserKey], bytes | None]:
        """See `SegmentStore.users_after`."""
        ...

    def write(self, rebuild_id: str, shoppers: Sequence[FoldedShopper], folded_events: int) -> bool:
        """Stores some shoppers of a running rebuild; returns whether it is to go on."""
        ...

    def succeed(self, rebuild_id: str, watermark: Watermark, now_us: int) -> None:
        """Puts a rebuild in force, and drops what earlier ones had folded, at once."""
        ...

    def finish(self, rebuild_id: str, state: OperationState, reason: str, message: str, now_us: int) -> None:
        """Ends a rebuild without effect; does nothing to one that has ended."""
        ...

    def request_cancel(self, rebuild_id: str, now_us: int) -> Rebuild:
        """Asks a rebuild to stop; raises NotFound."""
        ...

    def in_force(self, limit: int) -> tuple[Watermark, Iterator[FoldedShopper]] | None:
        """Returns the snapshot of the rebuild in force, and its shoppers, the most recently active first."""
        ...


class ItemFigures(Protocol):
    """What shoppers did to items. Raises Unavailable when the log cannot be read."""

    def read(self, now_us: int) -> tuple[dict[str, ItemCounts], Baskets]:
        """Returns the counts of every item that occurs in the log, as of a time, and the newest orders."""
        ...


class Suggestions(Protocol):
    """What to show whom."""

    def items(self, user_keys: Sequence[UserKey], count: int) -> list[list[str]]:
        """Returns item ids for each shopper, the best first; none where nothing can be said. Never fails."""
        ...


class UserEmbeddings(Protocol):
    """Shoppers as the sequence model in service sees them."""

    def of(self, user_keys: Sequence[UserKey]) -> list[Vector | None]:
        """Returns the vector of each; None where none is known, or nobody can be asked. Never fails."""
        ...


class TextEncoder(Protocol):
    """A model of language with weights.

    Attributes:
        model: names the weights: equal texts have equal vectors under one name.
        dimension: D.
    """

    model: str
    dimension: int

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Returns vectors of unit length, (N, D); 0 where a text says nothing. May take tens of ms a text."""
        ...


class ImageEncoder(Protocol):
    """A model of vision with weights; attributes as `TextEncoder`'s."""

    model: str
    dimension: int

    def encode(self, pictures: Sequence[bytes]) -> npt.NDArray[np.float32]:
        """Returns vectors of unit length, (N, D); 0 where the bytes are no picture that can be read."""
        ...


@dataclass(frozen=True, slots=True)
class ItemContent:
    """An item without its picture, and the SHA-256 of the picture; None without one."""

    item: Item
    picture_digest: bytes | None


@dataclass(frozen=True, slots=True)
class NewVectors:
    """What was committed to the store of contents between two snapshots, and the space in force, "" without one."""

    watermark: Watermark
    digests: Sequence[bytes]
    space_version: str


class ContentStore(Protocol):
    """Vectors by the digest of what they were made of. All raise Unavailable when the database does not answer."""

    def items(self, item_ids: Sequence[str]) -> list[ItemContent]:
        """Returns items that are there and not deleted, in any order."""
        ...

    def pictures(self, item_ids: Sequence[str]) -> dict[str, bytes]:
        """Returns the pictures of items that have one."""
        ...

    def vectors(self, model: str, digests: Sequence[bytes]) -> dict[bytes, npt.NDArray[np.float32]]:
        """Returns the vectors that a model made and that are known, each (D,)."""
        ...

    def put_vectors(self, model: str, digests: Sequence[bytes], vector_ND: npt.NDArray[np.float32]) -> None:
        """Stores vectors; those that are there stay."""
        ...

    def new_vectors(self, since: Watermark | None) -> NewVectors:
        """Returns the digests whose vectors came after a snapshot; none for None."""
        ...

    def space(self, version: str) -> ContentSpace | None:
        """Returns a space; None where it is gone or cannot be read."""
        ...

    def put_space(self, space: ContentSpace) -> None:
        """Puts a space in force."""
        ...
