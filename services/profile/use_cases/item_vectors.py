"""Every item as one vector: at once from its words and traits, and better when encoders have read it.

Each replica keeps the fused vectors of all items. Encoders are slow, so what they make is kept by the digest
of what they read; one replica at a time encodes what is missing, the newest first, and all hear of it through the
store. A worker that is killed goes on where the store ends.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt

from services.profile.domain.content_space import (
    DIMENSION,
    MAX_FITTED,
    Amounts,
    Contents,
    ContentSpace,
    digest_of,
    text_of,
)
from services.profile.domain.content_vectors import unit
from services.profile.domain.item_figures import MAX_NEIGHBOURS, Neighbour
from services.profile.domain.item_portrait import Vector
from services.profile.domain.items import Item
from services.profile.ports import ContentStore, ImageEncoder, TextEncoder
from shared.errors import Unavailable
from shared.tokens import Watermark

POLL_SECONDS = 0.25
ITEMS_AT_ONCE = 256
TEXTS_AT_ONCE, PICTURES_AT_ONCE = 16, 8
_ROWS_AT_ONCE = 65_536
_FIRST_FIT = 64

Float = npt.NDArray[np.float32]


@dataclass(slots=True)
class _Matrix:
    """Vectors by row; rows of 0 where nothing is known.

    Attributes:
        space: that of all rows.
    """

    space: ContentSpace
    item_ids: list[str] = field(default_factory=list)
    row_of: dict[str, int] = field(default_factory=dict)
    fused_ND: npt.NDArray[np.float16] = field(default_factory=lambda: np.zeros((64, DIMENSION), np.float16))

    def put(self, item_ids: Sequence[str], vector_ND: Float) -> None:
        for item_id in item_ids:
            if item_id not in self.row_of:
                self.item_ids.append(item_id)
                self.row_of[item_id] = len(self.item_ids) - 1
        if len(self.item_ids) > len(self.fused_ND):
            grown = np.zeros((max(len(self.item_ids), 2 * len(self.fused_ND)), DIMENSION), np.float16)
            grown[: len(self.fused_ND)] = self.fused_ND
            self.fused_ND = grown
        self.fused_ND[[self.row_of[item_id] for item_id in item_ids]] = vector_ND


class ItemVectors:
    """One thread calls `run`, one replica's worker `work`; anybody may call the rest.

    Args:
        text_encoder, image_encoder: None for none.
        publish: told the ids of items whose vectors are new.
        wake_worker: says that there is something to encode.
    """

    def __init__(
        self,
        store: ContentStore,
        text_encoder: TextEncoder | None,
        image_encoder: ImageEncoder | None,
        publish: Callable[[Sequence[str]], None],
    ) -> None:
        self._store = store
        self._text_encoder = text_encoder
        self._image_encoder = image_encoder
        self._publish = publish
        self.wake_worker: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._refreshed = threading.Condition(self._lock)
        self._known: dict[str, None] = {}
        self._dirty: dict[str, None] = {}
        # (model, digest) of contents that nobody has encoded yet, and the items that hold them.
        self._waiting: dict[tuple[str, bytes], set[str]] = {}
        self._pictured: set[str] = set()
        self._matrix: _Matrix | None = None
        self._watermark: Watermark | None = None
        self._touched = threading.Event()
        self._stopping = threading.Event()

    def touch(self, item_ids: Iterable[str]) -> None:
        """Says that items were written. Returns at once."""
        with self._lock:
            for item_id in item_ids:
                self._known[item_id] = None
                self._dirty[item_id] = None
        self._touched.set()

    def stop(self) -> None:
        """Ends `run`."""
        self._stopping.set()
        self._touched.set()

    def run(self) -> None:
        """Keeps vectors up to date until `stop`; survives every outage."""
        while not self._stopping.is_set():
            try:
                busy_seconds = self.refresh()
            except Unavailable:
                busy_seconds = 1.0
            # A moment between full batches, for those who write and read items meanwhile.
            self._stopping.wait(busy_seconds)
            if not self._dirty or self._matrix is None:
                self._touched.wait(POLL_SECONDS)
            self._touched.clear()

    def refresh(self) -> float:
        """Looks once at what is new, and brings some items up to date; returns the seconds to rest.

        Raises:
            Unavailable: the database does not answer.
        """
        new = self._store.new_vectors(self._watermark)
        if self._watermark is not None and new.watermark.xmax < self._watermark.xmax:
            # The database was replaced by an older one.
            self.touch(list(self._known))
        with self._lock:
            models = [e.model for e in (self._text_encoder, self._image_encoder) if e is not None]
            for digest in new.digests:
                for model in models:
                    self._dirty |= dict.fromkeys(self._waiting.pop((model, digest), ()))
        self._watermark = new.watermark
        self.load_space(new.space_version)
        with self._lock:
            item_ids = list(islice(self._dirty, ITEMS_AT_ONCE))
            for item_id in item_ids:
                del self._dirty[item_id]
        if not item_ids:
            return 0.0
        try:
            found, contents = self._contents(item_ids)
        except Unavailable:
            self.touch(item_ids)
            raise
        matrix = self._matrix
        vector_ND = np.zeros((len(item_ids), DIMENSION), np.float32)
        if matrix is not None and found:
            place = {item_id: at for at, item_id in enumerate(item_ids)}
            vector_ND[[place[item_id] for item_id in found]] = matrix.space.fuse(contents)
        with self._lock:
            if matrix is not None:
                matrix.put(item_ids, vector_ND)
            self._refreshed.notify_all()
        if matrix is not None:
            self._publish(found)
        self.wake_worker()
        return 0.02 if len(item_ids) == ITEMS_AT_ONCE else 0.0

    def load_space(self, version: str | None = None) -> bool:
        """Moves to the space in force, if it is another; returns whether there is one.

        Raises:
            Unavailable: the database does not answer.
        """
        version = self._store.new_vectors(None).space_version if version is None else version
        if version and (self._matrix is None or self._matrix.space.version != version):
            space = self._store.space(version)
            if space is not None:
                self._move_to(space)
        return self._matrix is not None

    def work(self) -> bool:
        """Fits a space, or encodes some contents, where one is due; returns whether there was anything to do.

        Raises:
            Unavailable: the database does not answer; nothing is lost.
        """
        if self._stopping.is_set():
            return False
        return self.fit_space() or self._encode_texts() or self._encode_pictures()

    def wait_for(self, item_id: str, timeout_seconds: float) -> bool:
        """Waits until an item has its vector; returns whether it has."""
        with self._lock:
            return self._refreshed.wait_for(
                lambda: self._matrix is not None and item_id in self._matrix.row_of, timeout_seconds
            )

    def of(self, item_ids: Sequence[str]) -> tuple[str, list[tuple[str, bytes]]]:
        """Returns the version of the space in force, and (item id, vector) of those that have one.

        A vector is DIMENSION numbers, float32, little endian. All are of the one space.
        """
        with self._lock:
            matrix = self._matrix
            if matrix is None:
                return "", []
            rows = [(item_id, row) for item_id in item_ids if (row := matrix.row_of.get(item_id)) is not None]
            # Half precision is near unit length only.
            vector_ND = unit(matrix.fused_ND[[row for _, row in rows]].astype("<f4"))
        known = zip(rows, vector_ND, strict=True)
        return matrix.space.version, [(item_id, v.tobytes()) for (item_id, _), v in known if v.any()]

    def vectors(self, item: Item, picture_digest: bytes | None = None) -> tuple[Vector | None, ...]:
        """Returns the vectors of an item's text, of its picture, and of all together; None where unknown.

        Raises:
            Unavailable: the database does not answer.
        """
        text = picture = None
        matrix = self._matrix
        content = text_of(item)
        if self._text_encoder is not None:
            text = self._stored(self._text_encoder.model, digest_of(content.encode()))
        if text is None and matrix is not None and content:
            (values,) = matrix.space.text.encode([content])
            if values.any():
                text = Vector(values.tolist(), matrix.space.text.MODEL, matrix.space.text.version)
        if self._image_encoder is not None and picture_digest is not None:
            picture = self._stored(self._image_encoder.model, picture_digest)
        version, found = self.of([item.item_id])
        fused = None
        if found:
            fused = Vector(np.frombuffer(found[0][1], "<f4").tolist(), ContentSpace.MODEL, version)
        return text, picture, fused

    def content(self, item_id: str) -> tuple[Item, bytes | None] | None:
        """Returns an item as stored, and the digest of its picture."""
        found = self._store.items([item_id])
        return (found[0].item, found[0].picture_digest) if found else None

    def similar(self, item_id: str) -> list[Neighbour]:
        """Returns the items whose vectors are nearest, the nearest first."""
        with self._lock:
            matrix = self._matrix
            row = None if matrix is None else matrix.row_of.get(item_id)
            if matrix is None or row is None:
                return []
            item_ids, fused_ND = matrix.item_ids, matrix.fused_ND
            count = len(item_ids)
        own_D = fused_ND[row].astype(np.float32)
        cosine_N = np.concatenate(
            [
                fused_ND[first : min(count, first + _ROWS_AT_ONCE)].astype(np.float32) @ own_D
                for first in range(0, count, _ROWS_AT_ONCE)
            ]
        )
        cosine_N[row] = -np.inf
        width = min(MAX_NEIGHBOURS, count - 1)
        best = np.argpartition(-cosine_N, width)[:width] if width else np.empty(0, np.int64)
        ranked = sorted((-float(cosine_N[at]), item_ids[at]) for at in best.tolist())
        return [Neighbour(neighbour, min(1.0, -score), 0) for score, neighbour in ranked if score < 0]

    def _stored(self, model: str, digest: bytes) -> Vector | None:
        vector = self._store.vectors(model, [digest]).get(digest)
        return None if vector is None or not vector.any() else Vector(vector.tolist(), model, model)

    def _move_to(self, space: ContentSpace) -> None:
        """Fuses every item anew, and only then answers with the new space."""
        matrix = _Matrix(space)
        with self._lock:
            item_ids = list(self._known)
        for first in range(0, len(item_ids), ITEMS_AT_ONCE):
            if self._stopping.is_set():
                return
            found, contents = self._contents(item_ids[first : first + ITEMS_AT_ONCE])
            if found:
                matrix.put(found, space.fuse(contents))
        with self._lock:
            self._matrix = matrix
            self._refreshed.notify_all()
        self._publish(matrix.item_ids)

    def _contents(self, item_ids: Sequence[str]) -> tuple[list[str], Contents]:
        """Returns those items that are there, and what is known of them; notes what waits to be encoded."""
        stored = self._store.items(item_ids)
        items = [one.item for one in stored]
        texts = [digest_of(text_of(item).encode()) if text_of(item) else None for item in items]
        pictures = [one.picture_digest for one in stored]
        contents = Contents.of(
            items, self._known_vectors(self._text_encoder, items, texts),
            self._known_vectors(self._image_encoder, items, pictures),
        )  # fmt: skip
        with self._lock:
            self._pictured.update(
                item.item_id for item, digest in zip(items, pictures, strict=True) if digest is not None
            )
        return [item.item_id for item in items], contents

    def _known_vectors(
        self,
        encoder: TextEncoder | ImageEncoder | None,
        items: Sequence[Item],
        digests: Sequence[bytes | None],
    ) -> Float | None:
        if encoder is None:
            return None
        known = self._store.vectors(encoder.model, [digest for digest in digests if digest is not None])
        vector_NE = np.zeros((len(items), encoder.dimension), np.float32)
        with self._lock:
            for row, (item, digest) in enumerate(zip(items, digests, strict=True)):
                if digest is None:
                    continue
                if digest in known:
                    vector_NE[row] = known[digest]
                else:
                    self._waiting.setdefault((encoder.model, digest), set()).add(item.item_id)
        return vector_NE

    def fit_space(self) -> bool:
        """Fits a space where one is due, and puts it in force; returns whether it did. Raises as `work` does."""
        with self._lock:
            if self._dirty and self._matrix is not None:
                return False
            matrix, count = self._matrix, len(self._known)
            waiting = {"": 0}
            for model, _ in self._waiting:
                waiting[model] = waiting.get(model, 0) + 1
            pictured = len(self._pictured)
        meanings = self._fittable(self._text_encoder, count, waiting)
        pictures = self._fittable(self._image_encoder, pictured, waiting)
        amounts = Amounts(min(MAX_FITTED, count), min(MAX_FITTED, meanings), min(MAX_FITTED, pictures))
        if not count or (matrix is not None and not amounts.outgrows(matrix.space.fitted)):
            return False
        # Another replica's may have come meanwhile.
        newest = self._store.new_vectors(None).space_version
        if (
            newest != ("" if matrix is None else matrix.space.version)
            and self._store.space(newest) is not None
        ):
            self._touched.set()
            return False
        with self._lock:
            item_ids = sorted(self._known)
        chosen = random.Random(0).sample(item_ids, min(MAX_FITTED, len(item_ids)))  # noqa: S311
        _, contents = self._contents(sorted(chosen))
        if not contents.texts:
            return False
        space = ContentSpace.fit(contents)
        if matrix is not None and not space.fitted.outgrows(matrix.space.fitted):
            return False
        self._store.put_space(space)
        self._touched.set()
        return True

    @staticmethod
    def _fittable(encoder: TextEncoder | ImageEncoder | None, count: int, waiting: dict[str, int]) -> int:
        if encoder is None:
            return 0
        missing = waiting.get(encoder.model, 0)
        ready = max(0, count - missing)
        return ready if ready >= _FIRST_FIT or not missing else 0

    def _newest_waiting(self, model: str, count: int) -> dict[bytes, str]:
        """Returns digests, and for each an item that holds the content."""
        with self._lock:
            ours = ((digest, held) for (of, digest), held in reversed(self._waiting.items()) if of == model)
            return {digest: next(iter(held)) for digest, held in islice(ours, count)}

    def _encode_texts(self) -> bool:
        encoder = self._text_encoder
        wanted = self._newest_waiting(encoder.model, TEXTS_AT_ONCE) if encoder is not None else {}
        if encoder is None or not wanted:
            return False
        missing = wanted.keys() - self._store.vectors(encoder.model, list(wanted)).keys()
        items = self._store.items([wanted[digest] for digest in missing])
        texts = {digest_of(text.encode()): text for text in (text_of(one.item) for one in items)}
        chosen = [digest for digest in missing if digest in texts]
        if chosen:
            vector_ND = encoder.encode([texts[digest] for digest in chosen])
            self._store.put_vectors(encoder.model, chosen, vector_ND)
        self._done(encoder.model, wanted)
        return True

    def _encode_pictures(self) -> bool:
        encoder = self._image_encoder
        wanted = self._newest_waiting(encoder.model, PICTURES_AT_ONCE) if encoder is not None else {}
        if encoder is None or not wanted:
            return False
        missing = wanted.keys() - self._store.vectors(encoder.model, list(wanted)).keys()
        found = self._store.pictures([wanted[digest] for digest in missing])
        pictures = {digest_of(picture): picture for picture in found.values()}
        chosen = [digest for digest in missing if digest in pictures]
        if chosen:
            vector_ND = encoder.encode([pictures[digest] for digest in chosen])
            self._store.put_vectors(encoder.model, chosen, vector_ND)
        self._done(encoder.model, wanted)
        return True

    def _done(self, model: str, digests: Iterable[bytes]) -> None:
        """Has items looked at again: their vectors are there, or they hold another content by now."""
        with self._lock:
            for digest in digests:
                self._dirty |= dict.fromkeys(self._waiting.pop((model, digest), ()))
        self._touched.set()
