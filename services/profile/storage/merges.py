"""Who stands for whom, in PostgreSQL. Replicas learn of it as they learn of events: by snapshots."""

from __future__ import annotations

from collections.abc import Callable

from services.profile.ports import Merge
from shared.database import Database
from shared.errors import FailedPrecondition
from shared.identity import UserKey

# An order of merges that everybody agrees upon: one writer at a time.
_LOCK = 0x53484F50_4D455247
MAX_MEMBERS = 100


class PostgresMerges:
    """Implements `ports.Merges`.

    Args:
        key_version: the current version of the user keys.
    """

    def __init__(self, database: Database, key_version: int) -> None:
        self._database = database
        self._key_version = key_version

    def merge(self, anonymous: UserKey, known: UserKey) -> Merge:
        """See `Merges.merge`."""
        with self._database.connect() as connection:
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            erased = connection.execute(
                "SELECT FROM feedback.tombstones_v1 WHERE user_key = ANY(%s) LIMIT 1", ([anonymous, known],)
            ).fetchone()
            rows = connection.execute(
                "SELECT anonymous_key, user_key FROM profile.merged_users WHERE anonymous_key = ANY(%s)",
                ([anonymous, known],),
            ).fetchall()
            stands_for = {bytes(key): bytes(root) if root is not None else None for key, root in rows}
            if erased is not None or None in stands_for.values():
                raise FailedPrecondition(
                    "USER_FORGOTTEN", "One of the two was erased, for ever; nothing was merged."
                )
            root = stands_for.get(known) or known
            before = stands_for.get(anonymous)
            # Already one, whichever of them was named the anonymous one.
            one = root in (before, anonymous)
            if not one:
                if before is not None:
                    raise FailedPrecondition(
                        "USER_ALREADY_MERGED",
                        "This visitor has become another shopper already; give the next visitor an id of their own.",
                    )
                members = connection.execute(
                    "SELECT count(*) FROM profile.merged_users WHERE user_key = ANY(%s)",
                    ([root, anonymous],),
                ).fetchone()
                assert members is not None
                if members[0] >= MAX_MEMBERS:
                    raise FailedPrecondition(
                        "TOO_MANY_MERGES",
                        f"{MAX_MEMBERS} visitors have become this shopper already: look for an id that many share.",
                    )
                connection.execute(
                    "UPDATE profile.merged_users SET user_key = %s, xid = pg_current_xact_id() WHERE user_key = %s",
                    (root, anonymous),
                )
                connection.execute(
                    "INSERT INTO profile.merged_users (anonymous_key, user_key, key_version) VALUES (%s, %s, %s)",
                    (anonymous, root, self._key_version),
                )
            row = connection.execute(
                "SELECT pg_current_xact_id()::text, (SELECT count(*) FROM (SELECT DISTINCT event_key "
                "FROM feedback.events_v1 WHERE user_key = %s) AS events)",
                (anonymous,),
            ).fetchone()
            assert row is not None
            return Merge(UserKey(root), int(row[1]), int(row[0]))

    def bring_forward(self, rotated: Callable[[bytes, int], UserKey]) -> int:
        """Copies what was merged under older user keys to the current ones; returns how many.

        The old rows stay until feedback has rewritten the log and retired the old keys.
        """
        with self._database.connect() as connection:
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            rows = connection.execute(
                "SELECT anonymous_key, user_key, key_version FROM profile.merged_users "
                "WHERE key_version < %s AND user_key IS NOT NULL",
                (self._key_version,),
            ).fetchall()
            for anonymous, root, version in rows:
                connection.execute(
                    "INSERT INTO profile.merged_users (anonymous_key, user_key, key_version) "
                    "VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
                    (rotated(bytes(anonymous), version), rotated(bytes(root), version), self._key_version),
                )
            return len(rows)
