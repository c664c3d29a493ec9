"""What belongs to a person: consent, erasure, export."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from services.feedback.domain.consent import Consent, Erasure, Receipt, containing_versions, receipt_payload
from services.feedback.ports import Clock, ConsentStore, ModelVersions, PersonStore, ReceiptSigner


class ManageConsent:
    """Sets and reads what a person allows."""

    def __init__(
        self, store: ConsentStore, clock: Clock, wake_readers: Callable[[], None] = lambda: None
    ) -> None:
        self._store = store
        self._clock = clock
        self._wake_readers = wake_readers

    def set(self, user_keys: Sequence[bytes], tombstone_key: bytes, consent: Consent) -> Consent:
        """Sets the fields that are not None; returns what is in force from now on."""
        written = self._store.write_consent(user_keys, tombstone_key, consent, self._clock.now())
        self._wake_readers()
        return written.in_force()

    def get(self, user_keys: Sequence[bytes], tombstone_key: bytes) -> Consent:
        """Returns what is in force."""
        return self._store.read_consent(user_keys, tombstone_key).in_force()


class ForgetUser:
    """Erases a person and signs a receipt."""

    def __init__(
        self,
        store: PersonStore,
        versions: ModelVersions,
        signer: ReceiptSigner,
        clock: Clock,
        wake_readers: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._versions = versions
        self._signer = signer
        self._clock = clock
        self._wake_readers = wake_readers

    def forget(self, user_keys: Sequence[bytes], tombstone_key: bytes) -> Receipt:
        """Returns the receipt once everything is erased. Repeating it is harmless."""
        erasure = self._store.erase(user_keys, tombstone_key, self._clock.now())
        self._wake_readers()
        receipt_id = str(uuid.uuid4())
        self._store.keep_receipt(receipt_id, tombstone_key, user_keys, erasure.rows, self._clock.now())
        return self._issued(receipt_id, erasure, user_keys)

    def issue_anew(self, receipt_id: str) -> Receipt:
        """Returns a receipt with the model versions of now; raises NotFound."""
        return self._issued(receipt_id, *self._store.receipt(receipt_id))

    def _issued(self, receipt_id: str, erasure: Erasure, user_keys: Sequence[bytes]) -> Receipt:
        # The time first: what is published while the registry is read is on the next one at the latest.
        now = self._clock.now()
        versions = containing_versions(self._versions.list_versions(), erasure)
        payload = receipt_payload(receipt_id, now, erasure, user_keys, versions)
        return Receipt(receipt_id, now, erasure, user_keys, versions, payload, self._signer.sign(payload))


class ExportUser:
    """Tells a person all that is known of them."""

    def __init__(self, people: PersonStore, consents: ConsentStore) -> None:
        self._people = people
        self._consents = consents

    def export(self, user_keys: Sequence[bytes], tombstone_key: bytes) -> Iterator[list[str]]:
        """Yields JSON lines: first the consent in force, then since when events are gone, then those there are from the oldest."""
        consent = self._consents.read_consent(user_keys, tombstone_key).in_force()
        yield [
            _json_line(
                {
                    "type": "consent",
                    "personalisation": consent.personalisation,
                    "training": consent.training,
                    "marketing": consent.marketing,
                    "update_time": consent.updated_at.isoformat() if consent.updated_at else None,
                    "forgotten": consent.forgotten,
                }
            )
        ]
        if (first := self._people.first_purged(user_keys)) is not None:
            yield [_json_line({"type": "purged_events", "first_received_at": first.isoformat()})]
        for events in self._people.export_events(user_keys):
            yield [_json_line({"type": "event", **event}) for event in events]


def _json_line(fields: dict[str, Any]) -> str:
    return json.dumps(fields, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
