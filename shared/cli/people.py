"""`shopkeeper profile` and `shopkeeper forget`."""

from __future__ import annotations

import json
from typing import Any

import grpc
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from shopkeeper.feedback.v1 import consent_pb2, event_kind_pb2
from shopkeeper.profile.v1 import catalog_service_pb2, profile_service_pb2, user_portrait_pb2

from shared.cli.clients import Clients
from shared.cli.output import say, show_json, show_table
from shared.errors import DataLoss

HISTORY_ROWS = 15
CALL_TIMEOUT_SECONDS = 10.0


def title_of(clients: Clients, item_id: str) -> str:
    """Returns the title of an item, or its id where the catalogue has none."""
    try:
        item = clients.catalog.GetItem(
            catalog_service_pb2.GetItemRequest(item_id=item_id), timeout=CALL_TIMEOUT_SECONDS
        )
    except grpc.RpcError:
        return item_id
    return item.title or item_id


def show_profile(clients: Clients, profile: profile_service_pb2.Profile, user: str, *, as_json: bool) -> None:
    """Prints the portrait and the newest events of a person."""
    if as_json:
        show_json(profile)
        return
    portrait, live = profile.portrait, profile.live
    rows: list[tuple[str, str]] = [("events", f"{max(portrait.event_count, live.summary.event_count):,}")]
    if live.summary.order_count:
        rows.append(("orders", f"{live.summary.order_count:,}"))
    rows.append(("may be personalised", "yes" if live.personalisation else "no"))
    if portrait.life_cycle_stage:
        stage = user_portrait_pb2.LifeCycleStage.Name(portrait.life_cycle_stage)
        rows.append(("stage", stage.removeprefix("LIFE_CYCLE_STAGE_").lower()))
    for interest in portrait.interests[:6]:
        facet = user_portrait_pb2.InterestFacet.Name(interest.facet).removeprefix("INTEREST_FACET_").lower()
        horizon = (
            user_portrait_pb2.InterestHorizon.Name(interest.horizon).removeprefix("INTEREST_HORIZON_").lower()
        )
        rows.append(
            (f"interest, {horizon.replace('_', ' ')}", f"{facet} {interest.value}: {interest.weight:.2f}")
        )
    if portrait.purchasing_power.HasField("price_level"):
        level = portrait.purchasing_power.price_level
        rows.append(("price level", f"{level.value:.2f} (from {level.evidence_count} prices)"))
    if portrait.churn_risk.HasField("no_purchase_probability"):
        risk = portrait.churn_risk
        rows.append(
            (f"no order within {risk.horizon_days} days", f"{risk.no_purchase_probability.value:.0%}")
        )
    show_table(f"{user} (pseudonym {profile.user_key.hex()[:8]}…)", ("what", "value"), rows)
    events = live.history[:HISTORY_ROWS]
    if events:
        titles = {item: title_of(clients, item) for item in dict.fromkeys(e.item_id for e in events)}
        show_table(
            "Newest events", ("time (UTC)", "kind", "item", "title"),
            [
                (
                    e.occurred_at.ToJsonString()[:19].replace("T", " "),
                    event_kind_pb2.EventKind.Name(e.kind).removeprefix("EVENT_KIND_").replace("_", " ").lower(),
                    e.item_id, titles[e.item_id],
                )
                for e in events
            ],
        )  # fmt: skip


def show_receipt(receipt: consent_pb2.ErasureReceipt, *, as_json: bool) -> None:
    """Prints what was erased."""
    if as_json:
        show_json(receipt)
        return
    rows = [(row.table, f"{row.row_count:,}") for row in receipt.erased_rows]
    show_table(
        f"Erased {receipt.erased_at.ToJsonString()[:19]}, receipt {receipt.receipt_id}",
        ("table", "#rows"),
        rows,
    )
    for version in receipt.model_versions:
        end = (
            f"is removed by {version.retire_time.ToJsonString()[:10]}"
            if version.HasField("retire_time")
            else "stays until a newer version replaces it: train again"
        )
        say(f"  Model {version.model} {version.version} may hold traces of the person; it {end}.")


def verify_receipt(receipt: consent_pb2.ErasureReceipt, key: Ed25519PublicKey) -> dict[str, Any]:
    """Returns the statement of a receipt, once its signature fits.

    Raises:
        DataLoss: RECEIPT_FORGED: the statement is not what the suite signed.
    """
    try:
        key.verify(receipt.signature, receipt.signed_payload)
        statement: dict[str, Any] = json.loads(receipt.signed_payload)
    except (InvalidSignature, ValueError):
        raise DataLoss(
            "RECEIPT_FORGED",
            "The signature does not fit: another key signed this receipt, or it was changed.",
        ) from None
    return statement
