"""Brings every data key under the present master key, without touching a text."""

from __future__ import annotations

import uuid

from services.feedback.storage import pg_arrays
from services.feedback.storage.text_cipher import TextCipher
from shared.database import Database

_PAGE_ROWS = 1_000
# `FOR UPDATE`: a person who is forgotten meanwhile, or a rotation of user keys, waits, and is not undone.
_PAGE = """
SELECT uuid_send(key_id), wrapped_key FROM feedback.data_keys
WHERE key_id > %s ORDER BY key_id LIMIT %s FOR UPDATE
"""
_REWRAP = """
UPDATE feedback.data_keys AS k SET wrapped_key = u.wrapped_key
FROM unnest(%s::uuid[], %s::bytea[]) AS u (key_id, wrapped_key) WHERE k.key_id = u.key_id
"""


def rewrap_data_keys(database: Database, cipher: TextCipher, page_rows: int = _PAGE_ROWS) -> tuple[int, int]:
    """Wraps by the master key what another key wrapped; a page a transaction, so that it may be cut and run again.

    Returns:
        How many data keys were wrapped anew, and how many there are.

    Raises:
        DataLoss: neither key unwraps one of them.
        Unavailable: the database cannot be reached; what is done stays done.
    """
    rewrapped = seen = 0
    last = bytes(16)
    while True:
        with database.connect() as connection:
            pg_arrays.register(connection)
            page = connection.execute(_PAGE, (uuid.UUID(bytes=last), page_rows), binary=True).fetchall()
            if not page:
                return rewrapped, seen
            new = [(key_id, wrapped) for key_id, old in page if (wrapped := cipher.rewrapped(old, key_id))]
            if new:
                connection.execute(
                    _REWRAP,
                    [
                        pg_arrays.uuid_array([key_id for key_id, _ in new]),
                        pg_arrays.bytes_array([wrapped for _, wrapped in new]),
                    ],
                )
        rewrapped += len(new)
        seen += len(page)
        last = page[-1][0]
