"""Segments in Postgres, and the walk over every shopper in the log."""

from __future__ import annotations

from typing import Any

import psycopg

from services.profile.domain.segments import Segment, SegmentChange
from shared.database import Database, trusted_sql
from shared.errors import Aborted, AlreadyExists, NotFound
from shared.identity import UserKey

_COLUMNS = """
    s.segment_id, s.display_name, s.description, v.filter, v.version, s.revision,
    (extract(epoch FROM s.create_time) * 1000000)::bigint, (extract(epoch FROM s.update_time) * 1000000)::bigint
"""
_SELECT = (
    f"SELECT {_COLUMNS} FROM profile.segments AS s JOIN profile.segment_versions AS v USING (segment_id)"  # noqa: S608
)
# One index probe for each distinct shopper, whatever number of events they have.
_USERS_AFTER = """
    WITH RECURSIVE walk (user_key, found) AS (
        (SELECT user_key, 1 FROM feedback.events_v1 WHERE user_key > %(after)s ORDER BY user_key LIMIT 1)
        UNION ALL
        SELECT next.user_key, walk.found + 1 FROM walk, LATERAL (
            SELECT e.user_key FROM feedback.events_v1 AS e WHERE e.user_key > walk.user_key
            ORDER BY e.user_key LIMIT 1) AS next
        WHERE walk.found < %(limit)s
    )
    SELECT w.user_key FROM walk AS w
    WHERE NOT EXISTS (SELECT FROM feedback.tombstones_v1 AS t WHERE t.user_key = w.user_key)
    ORDER BY 1
"""
_LAST_OF_WALK = _USERS_AFTER.replace(
    "SELECT w.user_key FROM walk AS w\n    WHERE NOT EXISTS (SELECT FROM feedback.tombstones_v1 AS t "
    "WHERE t.user_key = w.user_key)\n    ORDER BY 1",
    "SELECT max(user_key), count(*) FROM walk",
)


class PostgresSegments:
    """Implements `ports.SegmentStore`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, segment: Segment, request_id: str) -> Segment:
        """See `SegmentStore.create`."""
        with self._database.connect() as connection:
            if request_id:
                known = connection.execute(
                    "SELECT segment_id FROM profile.segments WHERE request_id = %s", (request_id,)
                ).fetchone()
                if known is not None:
                    return self._get(connection, known[0], 0)
            inserted = connection.execute(
                "INSERT INTO profile.segments (segment_id, display_name, description, request_id) "
                "VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING RETURNING 1",
                (segment.segment_id, segment.display_name, segment.description, request_id),
            ).fetchone()
            if inserted is None:
                if request_id:
                    # Another call of the same id was faster.
                    row = connection.execute(
                        "SELECT segment_id FROM profile.segments WHERE request_id = %s", (request_id,)
                    ).fetchone()
                    if row is not None:
                        return self._get(connection, row[0], 0)
                raise AlreadyExists(
                    "SEGMENT_ALREADY_EXISTS",
                    f"Segment {segment.segment_id} exists; change it with UpdateSegment, or choose another id.",
                    {"segmentId": segment.segment_id},
                )
            connection.execute(
                "INSERT INTO profile.segment_versions (segment_id, version, filter) VALUES (%s, 1, %s)",
                (segment.segment_id, segment.filter),
            )
            return self._get(connection, segment.segment_id, 0)

    def get(self, segment_id: str, version: int = 0) -> Segment:
        """See `SegmentStore.get`."""
        with self._database.connect() as connection:
            return self._get(connection, segment_id, version)

    def page(self, after_segment_id: str, limit: int) -> list[Segment]:
        """See `SegmentStore.page`."""
        with self._database.connect() as connection:
            rows = connection.execute(
                trusted_sql(
                    f"{_SELECT} WHERE v.version = s.version AND s.segment_id > %s ORDER BY s.segment_id LIMIT %s"
                ),
                (after_segment_id, limit),
            ).fetchall()
        return [Segment(*row) for row in rows]

    def update(self, change: SegmentChange) -> Segment:
        """See `SegmentStore.update`."""
        with self._database.connect() as connection:
            current = self._locked(connection, change.segment_id, change.revision)
            new_filter = change.filter is not None and change.filter != current.filter
            version = current.version + new_filter
            connection.execute(
                "UPDATE profile.segments SET display_name = %s, description = %s, version = %s, "
                "revision = revision + 1, update_time = clock_timestamp() WHERE segment_id = %s",
                (
                    current.display_name if change.display_name is None else change.display_name,
                    current.description if change.description is None else change.description,
                    version,
                    change.segment_id,
                ),
            )
            if new_filter:
                connection.execute(
                    "INSERT INTO profile.segment_versions (segment_id, version, filter) VALUES (%s, %s, %s)",
                    (change.segment_id, version, change.filter),
                )
            return self._get(connection, change.segment_id, 0)

    def delete(self, segment_id: str, revision: int | None) -> None:
        """See `SegmentStore.delete`."""
        with self._database.connect() as connection:
            self._locked(connection, segment_id, revision)
            connection.execute("DELETE FROM profile.segments WHERE segment_id = %s", (segment_id,))

    def users_after(self, user_key: bytes, limit: int) -> tuple[list[UserKey], bytes | None]:
        """See `SegmentStore.users_after`."""
        parameters = {"after": user_key, "limit": limit}
        with self._database.connect() as connection:
            rows = connection.execute(_USERS_AFTER, parameters).fetchall()
            last = connection.execute(_LAST_OF_WALK, parameters).fetchone()
        assert last is not None
        return [UserKey(bytes(key)) for (key,) in rows], bytes(last[0]) if last[1] == limit else None

    def _locked(self, connection: psycopg.Connection[Any], segment_id: str, revision: int | None) -> Segment:
        connection.execute("SELECT FROM profile.segments WHERE segment_id = %s FOR UPDATE", (segment_id,))
        current = self._get(connection, segment_id, 0)
        if revision is not None and revision != current.revision:
            raise Aborted(
                "ETAG_MISMATCH",
                f"Segment {segment_id} was changed by another; read it again and decide again.",
                {"currentEtag": str(current.revision)},
            )
        return current

    def _get(self, connection: psycopg.Connection[Any], segment_id: str, version: int) -> Segment:
        row = connection.execute(
            trusted_sql(
                f"{_SELECT} WHERE s.segment_id = %s AND v.version = coalesce(nullif(%s, 0), s.version)"
            ),
            (segment_id, version),
        ).fetchone()
        if row is None:
            which = f"version {version} of segment {segment_id}" if version else f"segment {segment_id}"
            raise NotFound(
                "SEGMENT_NOT_FOUND",
                f"There is no {which}; ListSegments names those there are.",
                {"segmentId": segment_id},
            )
        return Segment(*row)
