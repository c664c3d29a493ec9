"""Vectors of contents, and the space that they are fused in, in PostgreSQL."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg

from services.profile.domain.content_space import ContentSpace
from services.profile.ports import ItemContent, NewVectors
from services.profile.storage.catalogue import ITEM_COLUMNS_WITHOUT_PICTURE, item_of
from services.profile.storage.snapshots import NEW_SINCE, new_since, snapshot_of, watermark_of
from shared.database import Database, trusted_sql
from shared.tokens import Watermark

Float = npt.NDArray[np.float32]

_KEPT_SPACES = 3
_ITEMS = trusted_sql(
    f"SELECT {ITEM_COLUMNS_WITHOUT_PICTURE}, image_digest FROM items WHERE item_id = ANY(%s) AND NOT deleted"  # noqa: S608
)
_FOLLOWED = "SELECT xid FROM content_vectors"
_NEW = trusted_sql(f"SELECT content_digest FROM content_vectors WHERE {NEW_SINCE}")  # noqa: S608


class PostgresContents:
    """Implements `ports.ContentStore`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def items(self, item_ids: Sequence[str]) -> list[ItemContent]:
        """See `ports.ContentStore`."""
        with self._database.connect() as connection:
            rows = connection.execute(_ITEMS, (list(item_ids),)).fetchall()
        return [ItemContent(item_of(row[:-1]), None if row[-1] is None else bytes(row[-1])) for row in rows]

    def pictures(self, item_ids: Sequence[str]) -> dict[str, bytes]:
        """See `ports.ContentStore`."""
        with self._database.connect() as connection:
            rows = connection.execute(
                "SELECT item_id, image_bytes FROM items WHERE item_id = ANY(%s) AND image_digest IS NOT NULL",
                (list(item_ids),),
            ).fetchall()
        return {item_id: bytes(picture) for item_id, picture in rows}

    def vectors(self, model: str, digests: Sequence[bytes]) -> dict[bytes, Float]:
        """See `ports.ContentStore`."""
        if not digests:
            return {}
        with self._database.connect() as connection:
            rows = connection.execute(
                "SELECT content_digest, vector FROM content_vectors WHERE model = %s AND content_digest = ANY(%s)",
                (model, list(set(digests))),
                binary=True,
            ).fetchall()
        return {bytes(digest): np.frombuffer(vector, "<f2").astype(np.float32) for digest, vector in rows}

    def put_vectors(self, model: str, digests: Sequence[bytes], vector_ND: Float) -> None:
        """See `ports.ContentStore`."""
        packed = [row.tobytes() for row in vector_ND.astype("<f2")]
        with self._database.connect() as connection:
            connection.execute(
                """
                INSERT INTO content_vectors (model, content_digest, vector)
                SELECT %s, * FROM unnest(%s::bytea[], %s::bytea[]) ON CONFLICT DO NOTHING
                """,
                (model, list(digests), packed),
            )

    def new_vectors(self, since: Watermark | None) -> NewVectors:
        """See `ports.ContentStore`."""
        with snapshot_of(self._database) as (connection, snapshot):
            version = _newest_version(connection)
            watermark = watermark_of(connection, snapshot, _FOLLOWED, since)
            if since is None or (watermark.xmax == since.xmax and not since.in_progress):
                return NewVectors(watermark, (), version)
            rows = connection.execute(_NEW, new_since(since), binary=True).fetchall()
        return NewVectors(watermark, [bytes(digest) for (digest,) in rows], version)

    def space(self, version: str) -> ContentSpace | None:
        """See `ports.ContentStore`."""
        with self._database.connect() as connection:
            row = connection.execute(
                "SELECT arrays FROM content_spaces WHERE version = %s", (version,), binary=True
            ).fetchone()
        if row is None:
            return None
        try:
            with np.load(io.BytesIO(row[0]), allow_pickle=False) as arrays:
                return ContentSpace.of_arrays(dict(arrays))
        # A space that cannot be read is fitted anew.
        except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error):
            return None

    def put_space(self, space: ContentSpace) -> None:
        """See `ports.ContentStore`."""
        packed = io.BytesIO()
        np.savez_compressed(packed, allow_pickle=False, **space.arrays())
        with self._database.connect() as connection:
            connection.execute(
                """
                INSERT INTO content_spaces (version, arrays) VALUES (%s, %s)
                ON CONFLICT (version) DO UPDATE SET arrays = excluded.arrays, fit_time = clock_timestamp()
                """,
                (space.version, packed.getvalue()),
            )
            connection.execute(
                """
                DELETE FROM content_spaces WHERE version NOT IN
                    (SELECT version FROM content_spaces ORDER BY fit_time DESC LIMIT %s)
                """,
                (_KEPT_SPACES,),
            )


def _newest_version(connection: psycopg.Connection[Any]) -> str:
    row = connection.execute("SELECT version FROM content_spaces ORDER BY fit_time DESC LIMIT 1").fetchone()
    return "" if row is None else str(row[0])
