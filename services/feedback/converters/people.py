"""Consent and receipts, to the domain and back."""

from __future__ import annotations

from datetime import datetime

from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.feedback.v1 import consent_pb2

from services.feedback.domain.consent import Consent, Receipt
from shared.errors import FieldViolation, InvalidInput


def to_timestamp(moment: datetime) -> Timestamp:
    """Returns a moment as the contract says it."""
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


def from_consent(consent: consent_pb2.Consent) -> Consent:
    """Returns the fields that are set.

    Raises:
        InvalidInput: none is.
    """

    def stated(name: str) -> bool | None:
        return getattr(consent, name) if consent.HasField(name) else None  # type: ignore[arg-type]

    result = Consent(stated("personalisation"), stated("training"), stated("marketing"))
    if result == Consent():
        problem = "sets nothing; set personalisation, training or marketing."
        raise InvalidInput(
            "INVALID_ARGUMENT", f"consent {problem}", violations=[FieldViolation("consent", problem)]
        )
    return result


def to_consent(consent: Consent) -> consent_pb2.Consent:
    """Returns consent in force as the contract says it."""
    return consent_pb2.Consent(
        personalisation=consent.personalisation,
        training=consent.training,
        marketing=consent.marketing,
        update_time=to_timestamp(consent.updated_at) if consent.updated_at else None,
        forgotten=consent.forgotten,
    )


def to_receipt(receipt: Receipt) -> consent_pb2.ErasureReceipt:
    """Returns a receipt as the contract says it."""
    return consent_pb2.ErasureReceipt(
        receipt_id=receipt.receipt_id,
        issue_time=to_timestamp(receipt.issued_at),
        erased_at=to_timestamp(receipt.erasure.erased_at),
        user_keys=list(receipt.user_keys),
        erased_rows=[
            consent_pb2.ErasedRows(table=table, row_count=count)
            for table, count in sorted(receipt.erasure.rows.items())
        ],
        model_versions=[
            consent_pb2.ContainingModelVersion(
                model=version.model,
                version=version.version,
                create_time=to_timestamp(version.created_at),
                in_service=version.in_service,
                retire_time=to_timestamp(version.retire_at) if version.retire_at else None,
            )
            for version in receipt.model_versions
        ],
        signed_payload=receipt.signed_payload,
        signature=receipt.signature,
    )
