"""Consent, erasure and export: everything that is stored of one person."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.ciphers.aead import AESGCMSIV
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from sqlalchemy.dialects import postgresql as pg

from services.feedback.domain.consent import Consent, Erasure
from services.feedback.domain.events import ConsentBit, RowReason
from services.feedback.storage.partitions import WRITERS_LOCK
from services.feedback.storage.tables import XID8, consents, data_keys, tombstones
from services.feedback.storage.text_cipher import TextCipher, decrypt
from shared.database import Database
from shared.errors import FailedPrecondition, NotFound
from shared.event_kinds import EventKind
from shared.telemetry import get_logger

_EXPORT_ROWS = 200


class PostgresPeople:
    """The ConsentStore and the PersonStore."""

    def __init__(self, database: Database, cipher: TextCipher) -> None:
        self._database = database
        self._cipher = cipher
        self._logger = get_logger("feedback")

    # Consent

    def read_consent(self, user_keys: Sequence[bytes], tombstone_key: bytes) -> Consent:
        """Returns the stored consent; an empty one when the person never said."""
        with self._database.begin() as connection:
            erased_at = connection.scalar(
                sa.select(tombstones.c.erased_at).where(tombstones.c.tombstone_key == tombstone_key)
            )
            if erased_at is not None:
                return Consent(updated_at=erased_at, forgotten=True)
            return _newest_consent(connection, user_keys)

    def write_consent(
        self, user_keys: Sequence[bytes], tombstone_key: bytes, consent: Consent, now: datetime
    ) -> Consent:
        """Sets the fields that are not None; raises FailedPrecondition for a forgotten person."""
        with self._database.begin() as connection:
            # As a writer of the log does: an erasure under way waits for this, or this sees its tombstone.
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock_shared(WRITERS_LOCK)))
            # Two settings of different fields at once must both count.
            connection.execute(
                sa.select(
                    sa.func.pg_advisory_xact_lock(int.from_bytes(tombstone_key[:8], "big", signed=True))
                )
            )
            if connection.scalar(sa.select(sa.literal(1)).where(tombstones.c.tombstone_key == tombstone_key)):
                raise FailedPrecondition(
                    "USER_FORGOTTEN",
                    "This person has been forgotten, so nothing can be set for them; a returning shopper needs "
                    "a new user_id.",
                )
            before = _newest_consent(connection, user_keys)
            after = Consent(
                before.personalisation if consent.personalisation is None else consent.personalisation,
                before.training if consent.training is None else consent.training,
                before.marketing if consent.marketing is None else consent.marketing,
                now,
            )
            values = {
                "personalisation": after.personalisation,
                "training": after.training,
                "marketing": after.marketing,
                "updated_at": now,
            }
            # Under every key version: rows written before a rotation obey as well.
            statement = pg.insert(consents).values(
                [
                    {"user_key": key, "key_version": len(user_keys) - place, **values}
                    for place, key in enumerate(user_keys)
                ]
            )
            connection.execute(
                statement.on_conflict_do_update(
                    index_elements=[consents.c.user_key],
                    set_={**{name: statement.excluded[name] for name in values}, "xid": XID8},
                )
            )
            return after

    # Erasure

    def erase(self, user_keys: Sequence[bytes], tombstone_key: bytes, now: datetime) -> Erasure:
        """Erases a person; see the port.

        Three steps, each committed: the tombstone, which every later statement of a writer sees; a
        barrier that waits for the writers under way, which may not have seen it; then the rows.
        Cut short after the first, `finish_erasures` takes it up.
        """
        keys = list(user_keys)
        with self._database.begin() as connection:
            statement = pg.insert(tombstones).values(
                tombstone_key=tombstone_key, user_keys=keys, erased_at=now, buried_xid=XID8
            )
            # A key version added since the first erasure joins the list.
            erased_at = connection.scalar(
                statement.on_conflict_do_update(
                    index_elements=[tombstones.c.tombstone_key],
                    set_={"user_keys": keys, "completed_at": None},
                ).returning(tombstones.c.erased_at)
            )
        return self._erase_rows(keys, tombstone_key, erased_at)

    def finish_erasures(self, minimum_age_seconds: float = 0.0) -> int:
        """Completes erasures that a crash, or a deadline, cut short; returns their number."""
        with self._database.begin() as connection:
            unfinished = connection.execute(
                sa.select(tombstones).where(
                    tombstones.c.completed_at.is_(None),
                    tombstones.c.erased_at
                    <= sa.func.now() - sa.func.make_interval(0, 0, 0, 0, 0, 0, minimum_age_seconds),
                )
            ).fetchall()
        for row in unfinished:
            self._erase_rows(list(row.user_keys), row.tombstone_key, row.erased_at)
        return len(unfinished)

    def _erase_rows(self, keys: list[bytes], tombstone_key: bytes, erased_at: Any) -> Erasure:
        with self._database.begin() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(WRITERS_LOCK)))
        rows: dict[str, int] = {}
        with self._database.connect() as connection:
            row = connection.execute(
                "WITH erased AS (DELETE FROM feedback.events WHERE user_key = ANY (%s) RETURNING received_at) "
                "SELECT count(*), min(received_at) FROM erased",
                (keys,),
            ).fetchone()
            assert row is not None
            rows["events"], first_received_at = row
            # Once for each key version, but one consent to the person.
            erased = connection.execute("DELETE FROM feedback.consents WHERE user_key = ANY (%s)", (keys,))
            rows["consents"] = min(1, erased.rowcount)
            erased = connection.execute("DELETE FROM feedback.data_keys WHERE user_key = ANY (%s)", (keys,))
            rows["data_keys"] = erased.rowcount
            # A purge, or their age, may have taken others of the person's events before.
            row = connection.execute(
                "WITH gone AS (DELETE FROM feedback.purged_people WHERE user_key = ANY (%s) RETURNING first_received_at) "
                "SELECT LEAST(min(first_received_at), %s) FROM gone",
                (keys, first_received_at),
            ).fetchone()
            first_received_at = row[0] if row else first_received_at
            connection.execute("DELETE FROM feedback.bot_windows WHERE user_keys && %s::bytea[]", (keys,))
            # A reader that saw the tombstone before the rows were gone sees it once more.
            row = connection.execute(
                "UPDATE feedback.tombstones SET completed_at = now(), xid = pg_current_xact_id(), "
                "settled_at = COALESCE(settled_at, now()), "
                "first_received_at = LEAST(first_received_at, %s) WHERE tombstone_key = %s "
                "RETURNING first_received_at, buried_xid::text, settled_at",
                (first_received_at, tombstone_key),
            ).fetchone()
            # An earlier erasure, or one cut short, may have taken the events: the models still hold them.
            first_received_at, buried_xid, settled_at = row or (first_received_at, None, None)
        return Erasure(
            erased_at, rows, first_received_at, int(buried_xid) if buried_xid else None, settled_at
        )

    # Receipts

    def keep_receipt(
        self,
        receipt_id: str,
        tombstone_key: bytes,
        user_keys: Sequence[bytes],
        rows: Mapping[str, int],
        now: datetime,
    ) -> None:
        """Keeps what a receipt says of the rows."""
        with self._database.connect() as connection:
            connection.execute(
                "INSERT INTO feedback.erasure_receipts (receipt_id, tombstone_key, user_keys, erased_rows, issued_at) "
                "VALUES (%s, %s, %s, %s, %s)",
                (receipt_id, tombstone_key, list(user_keys), Jsonb(dict(rows)), now),
            )

    def receipt(self, receipt_id: str) -> tuple[Erasure, list[bytes]]:
        """Returns the erasure of a receipt, and the user keys it names; raises NotFound (RECEIPT_NOT_FOUND)."""
        try:
            wanted = uuid.UUID(receipt_id)
        except ValueError:
            raise _no_receipt(receipt_id) from None
        with self._database.connect() as connection:
            row = connection.execute(
                "SELECT r.erased_rows, r.user_keys, t.erased_at, t.first_received_at, t.buried_xid::text, t.settled_at "
                "FROM feedback.erasure_receipts AS r JOIN feedback.tombstones AS t USING (tombstone_key) "
                "WHERE r.receipt_id = %s",
                (wanted,),
            ).fetchone()
        if row is None:
            raise _no_receipt(receipt_id)
        rows, user_keys, erased_at, first_received_at, xid, settled_at = row
        erasure = Erasure(erased_at, rows, first_received_at, int(xid) if xid else None, settled_at)
        return erasure, [bytes(key) for key in user_keys]

    # Export

    def export_events(self, user_keys: Sequence[bytes]) -> Iterator[list[dict[str, Any]]]:
        """Yields the person's events from the oldest, in lists; texts decrypted."""
        keys_of = self._data_keys(user_keys)
        last: bytes | None = None
        # Keyset pages, not a cursor: a slow reader must not hold a transaction open.
        while True:
            with self._database.connect() as connection:
                cursor = connection.cursor(row_factory=dict_row, binary=True)
                rows = cursor.execute(
                    "SELECT uuid_send(event_key) AS key, * FROM feedback.events "
                    "WHERE user_key = ANY (%s) AND (%s::uuid IS NULL OR event_key > %s::uuid) "
                    "ORDER BY event_key LIMIT %s",
                    (
                        list(user_keys),
                        last.hex() if last else None,
                        last.hex() if last else None,
                        _EXPORT_ROWS,
                    ),
                ).fetchall()
            if rows:
                yield [_exported(row, keys_of) for row in rows]
            if len(rows) < _EXPORT_ROWS:
                return
            last = rows[-1]["key"]

    def first_purged(self, user_keys: Sequence[bytes]) -> datetime | None:
        """Returns when the first of the person's events came in that a purge or its age took; None where none did."""
        with self._database.connect() as connection:
            row = connection.execute(
                "SELECT min(first_received_at) FROM feedback.purged_people WHERE user_key = ANY (%s)",
                (list(user_keys),),
            ).fetchone()
        return row[0] if row else None

    def _data_keys(self, user_keys: Sequence[bytes]) -> dict[bytes, tuple[bytes, AESGCMSIV]]:
        with self._database.begin() as connection:
            rows = connection.execute(
                sa.select(data_keys).where(data_keys.c.user_key.in_(list(user_keys)))
            ).fetchall()
        return {
            row.user_key: (row.key_id.bytes, self._cipher.unwrap(row.wrapped_key, row.key_id.bytes))
            for row in rows
        }


def _no_receipt(receipt_id: str) -> NotFound:
    return NotFound(
        "RECEIPT_NOT_FOUND",
        "There is no such receipt here: it is mistyped, or was issued after the backup that this database was restored "
        "from. ForgetUser again issues another one.",
        {"receiptId": receipt_id[:64]},
    )


def _newest_consent(connection: sa.Connection, user_keys: Sequence[bytes]) -> Consent:
    row = connection.execute(
        sa.select(consents)
        .where(consents.c.user_key.in_(list(user_keys)))
        .order_by(consents.c.updated_at.desc())
        .limit(1)
    ).first()
    return (
        Consent()
        if row is None
        else Consent(row.personalisation, row.training, row.marketing, row.updated_at)
    )


def _exported(row: dict[str, Any], keys_of: dict[bytes, tuple[bytes, AESGCMSIV]]) -> dict[str, Any]:
    event: dict[str, Any] = {
        "event_key": str(row["event_key"]),
        "kind": EventKind(row["kind"]).name,
        "occurred_at": row["occurred_at"].isoformat(),
        "received_at": row["received_at"].isoformat(),
    }
    for name in (
        "item_id", "quantity", "price_micros", "currency_code", "value", "placement", "serving_config",
        "model_version", "variant", "position", "propensity", "attributes",
    ):  # fmt: skip
        if row[name] is not None:
            event[name] = row[name]
    for name in ("device", "channel"):
        if row[name]:
            event[name] = row[name]
    for name in ("session_key", "recommendation_id"):
        if row[name] is not None:
            event[name] = base64.b16encode(row[name]).decode().lower()
    if row["line_items"]:
        event["lines"] = [
            {"item_id": item, "quantity": quantity, "price_micros": price}
            for item, quantity, price in zip(
                row["line_items"], row["line_quantities"], row["line_prices"], strict=True
            )
        ]
    if row["impression_items"]:
        event["impressions"] = [
            {"item_id": item, "position": position}
            for item, position in zip(row["impression_items"], row["impression_positions"], strict=True)
        ]
    if stated := _stated_consent(row["consent"]):
        event["consent"] = stated
    if row["is_bot"]:
        event["marked_as_bot"] = True
    if row["quarantine_reason"] is not None:
        event["quarantine_reason"] = RowReason(row["quarantine_reason"]).name
    if row["text"] is not None and (entry := keys_of.get(row["user_key"])):
        event["text"] = decrypt(entry[1], row["text"], row["key"], entry[0])
    return event


def _stated_consent(bits: int) -> dict[str, bool]:
    return {
        name.lower(): bool(bits & ConsentBit[name])
        for name in ("PERSONALISATION", "TRAINING", "MARKETING")
        if bits & ConsentBit[f"{name}_STATED"]
    }
