"""The list of erased people as a file beside the backups: pseudonyms and times, under a message authentication code.

A restored database erases whom the list names. A line that is missing would bring a person back, and one too many
would erase somebody who never asked: so the last line proves the others, under a key of its own.
"""

from __future__ import annotations

import csv
import hmac
import io
from datetime import datetime
from pathlib import Path

from shared.database import Database
from shared.errors import DataLoss
from shared.keys import read_secret

_SEAL = "hmac-sha256"


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
        """Returns CSV: tombstone key, user keys (spaces between), time of erasure; then the number of lines and the code."""
        with self._database.connect() as connection:
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
        body = text.getvalue()
        return f"{body}{_SEAL},{len(rows)},{self._code(body)}\n"

    def replay(self, text: str) -> int:
        """Marks everybody on the list as to be erased, all or nobody; returns their number.

        Raises:
            DataLoss: TOMBSTONES_DAMAGED: the list is cut off, changed, or of another suite. Nothing was marked.
        """
        people = self._verified(text)
        with self._database.connect() as connection:
            for tombstone_key, user_keys, erased_at in people:
                connection.execute(
                    "INSERT INTO feedback.tombstones AS t (tombstone_key, user_keys, erased_at) VALUES (%s, %s, %s) "
                    "ON CONFLICT (tombstone_key) DO UPDATE SET completed_at = NULL, "
                    "user_keys = t.user_keys || ARRAY(SELECT unnest(excluded.user_keys) EXCEPT SELECT unnest(t.user_keys))",
                    (tombstone_key, user_keys, erased_at),
                )
        return len(people)

    def _verified(self, text: str) -> list[tuple[bytes, list[bytes], datetime]]:
        body, _, last = text.removesuffix("\n").rpartition("\n")
        body = body + "\n" if body else ""
        seal = last.split(",")
        if not text.endswith("\n") or len(seal) != 3 or seal[0] != _SEAL:
            raise _damaged("its last line is missing: the file was cut off")
        if not hmac.compare_digest(seal[2].encode(), self._code(body).encode()):
            raise _damaged("its code does not fit: it was changed or cut, or another tombstone_key made it")
        return [
            (
                bytes.fromhex(tombstone),
                [bytes.fromhex(key) for key in keys.split()],
                datetime.fromisoformat(at),
            )
            for tombstone, keys, at in csv.reader(io.StringIO(body))
        ]

    def _code(self, body: str) -> str:
        return hmac.new(self._key, body.encode(), "sha256").hexdigest()


def _damaged(why: str) -> DataLoss:
    return DataLoss(
        "TOMBSTONES_DAMAGED",
        f"The list of erased people cannot be trusted: {why}. Nobody was marked; take an earlier or another copy.",
    )
