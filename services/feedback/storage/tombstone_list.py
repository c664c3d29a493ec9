"""The list of erased people as a file beside the backups: pseudonyms and times, under a message authentication code.

A restored database erases whom the list names. A line that is missing would bring a person back, and one too many
would erase somebody who never asked: so the last line proves the others, under a key of its own. It proves their number
and the time of the list too, so that an older list does not pass for the newest: one that lacks an erasure which the
restored database knows is older than the backup, and an operator may say how old it may be at most.
"""

from __future__ import annotations

import csv
import hmac
import io
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from shared.database import Database
from shared.errors import DataLoss, FailedPrecondition
from shared.keys import read_secret

_SEAL = "hmac-sha256"


@dataclass(frozen=True, slots=True)
class Replayed:
    """What was replayed.

    Attributes:
        people: on the list.
        exported_at: when the list was written, by the clock of its database.
        newest_erased_at: of the people; None of nobody.
    """

    people: int
    exported_at: datetime
    newest_erased_at: datetime | None


class TombstoneList:
    """Writes and reads the list.

    Args:
        tombstone_secret: 32 bytes; the key of the code is derived from it, and used for nothing else.
    """

    def __init__(self, database: Database, tombstone_secret: bytes) -> None:
        self._database = database
        self._key = hmac.digest(tombstone_secret, b"tombstone list", "sha256")

    @classmethod
    def from_directory(cls, database: Database, keys: Path) -> TombstoneList:
        """Returns the list of a key directory; raises FailedPrecondition (KEY_MISSING)."""
        return cls(database, read_secret(keys, "tombstone_key"))

    def export(self) -> str:
        """Returns CSV: tombstone key, user keys (spaces between), time of erasure; then number of lines, time, code."""
        with self._database.connect() as connection:
            # The time first: who is erased meanwhile may be on the list, and is never promised to be.
            row = connection.execute("SELECT now()").fetchone()
            assert row is not None
            exported_at = row[0].astimezone(UTC)
            rows = connection.execute(
                "SELECT tombstone_key, user_keys, erased_at FROM feedback.tombstones ORDER BY erased_at, tombstone_key"
            ).fetchall()
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for tombstone_key, user_keys, erased_at in rows:
            writer.writerow(
                [
                    bytes(tombstone_key).hex(),
                    " ".join(bytes(key).hex() for key in user_keys),
                    erased_at.isoformat(),
                ]
            )
        body = f"{text.getvalue()}{_SEAL},{len(rows)},{exported_at.isoformat()},"
        return f"{body}{self._code(body)}\n"

    def replay(self, text: str, exported_after: datetime | None = None) -> Replayed:
        """Marks everybody on the list as to be erased, all or nobody.

        Args:
            exported_after: lists from before are refused; None: the operator does not say.

        Raises:
            DataLoss: TOMBSTONES_DAMAGED: the list is cut off, changed, or of another suite. Nothing was marked.
            FailedPrecondition: TOMBSTONES_STALE: there is, or should be, a newer list. Nothing was marked.
        """
        exported_at, people = self._verified(text)
        if exported_after is not None and exported_at < exported_after:
            raise _stale(
                exported_at, f"it was to be from after {exported_after.isoformat(timespec='seconds')}"
            )
        with self._database.connect() as connection:
            row = connection.execute(
                "SELECT count(*) FROM feedback.tombstones WHERE NOT tombstone_key = ANY (%s)",
                ([tombstone_key for tombstone_key, _, _ in people],),
            ).fetchone()
            if row and row[0]:
                raise _stale(
                    exported_at, f"{row[0]} of those whom this database knows as erased are not on it"
                )
            for tombstone_key, user_keys, erased_at in people:
                connection.execute(
                    "INSERT INTO feedback.tombstones AS t (tombstone_key, user_keys, erased_at) VALUES (%s, %s, %s) "
                    "ON CONFLICT (tombstone_key) DO UPDATE SET completed_at = NULL, "
                    "user_keys = t.user_keys || ARRAY(SELECT unnest(excluded.user_keys) EXCEPT SELECT unnest(t.user_keys))",
                    (tombstone_key, user_keys, erased_at),
                )
        return Replayed(len(people), exported_at, max((at for _, _, at in people), default=None))

    def _verified(self, text: str) -> tuple[datetime, list[tuple[bytes, list[bytes], datetime]]]:
        lines = text.splitlines(keepends=True)
        seal = lines[-1].removesuffix("\n").split(",") if lines else []
        if not text.endswith("\n") or len(seal) != 4 or seal[0] != _SEAL:
            raise _damaged("its last line is missing: the file was cut off, or an older build wrote it")
        proven = text.removesuffix(seal[3] + "\n")
        if not hmac.compare_digest(seal[3].encode(), self._code(proven).encode()):
            raise _damaged("its code does not fit: it was changed or cut, or another tombstone_key made it")
        return datetime.fromisoformat(seal[2]), [
            (
                bytes.fromhex(tombstone),
                [bytes.fromhex(key) for key in keys.split()],
                datetime.fromisoformat(at),
            )
            for tombstone, keys, at in csv.reader(lines[:-1])
        ]

    def _code(self, body: str) -> str:
        return hmac.new(self._key, body.encode(), "sha256").hexdigest()


def _stale(exported_at: datetime, why: str) -> FailedPrecondition:
    moment = exported_at.isoformat(timespec="seconds")
    return FailedPrecondition(
        "TOMBSTONES_STALE",
        f"This list of erased people, of {moment}, is not the newest: {why}. Nobody was marked; take the newest list. Where "
        "there is none, finish-erasures and the receipts since say who is to be erased again.",
        {"exportedAt": moment},
    )


def _damaged(why: str) -> DataLoss:
    return DataLoss(
        "TOMBSTONES_DAMAGED",
        f"The list of erased people cannot be trusted: {why}. Nobody was marked; take an earlier or another copy.",
    )
