"""What lies outside of the database: the model registry, the catalogue, the signing key, the clock."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client import Counter
from shopkeeper.profile.v1 import catalog_service_pb2, catalog_service_pb2_grpc

from services.feedback.domain.consent import ModelVersion, Reading
from services.feedback.domain.events import EventColumns
from shared.bundle.registry import Registry
from shared.errors import ShopkeeperError
from shared.telemetry import get_logger
from shared.tokens import Watermark

PRODUCTION = "production"
# Some 100 bytes each. A larger catalogue is not known, and nothing is said of its items.
MAX_ITEMS = 500_000
_PAGE_ITEMS = 1_000
_CALL_TIMEOUT_SECONDS = 10.0
_TOLD_ITEMS = 20
_UNKNOWN = Counter(
    "shopkeeper_feedback_unknown_item_events_total",
    "Events that name an item that the catalogue does not know.",
)


class RegistryModelVersions:
    """The ModelVersions of a registry directory.

    Args:
        retention_days: a version that no alias names is removed when so old; 0: never.
    """

    def __init__(self, registry: Path, retention_days: int = 0) -> None:
        self._retention_days = retention_days
        self._registry = Registry(registry)
        self._logger = get_logger("feedback")

    def list_versions(self) -> list[ModelVersion]:
        """Returns every version whose manifest can be read."""
        versions = []
        for model, version in self._registry.versions():
            try:
                manifest = self._registry.read_manifest(model, version)
                created_at = _moment(manifest["created_at"])
                readings = readings_of(manifest)
                aliases = {state.alias: state.version for state in self._registry.aliases(model)}
            except (ShopkeeperError, KeyError, TypeError, ValueError) as error:
                self._logger.warning(
                    "model version left out of a receipt", model=model, version=version, cause=repr(error)
                )
                continue
            retire_at = (
                created_at + timedelta(days=self._retention_days)
                if self._retention_days and version not in aliases.values()
                else None
            )
            in_service = aliases.get(PRODUCTION) == version
            versions.append(ModelVersion(model, version, created_at, in_service, retire_at, readings))
        return versions


def readings_of(manifest: Mapping[str, Any]) -> tuple[Reading, ...]:
    """Returns how the version of a manifest, and those whose weights it began with, read the log.

    Raises:
        KeyError, TypeError, ValueError: it says something else than a manifest does.
    """
    lineage = manifest.get("lineage", [])
    if not lineage and manifest.get("hyper_parameters", {}).get("initial_version"):
        # Nothing is known of the ancestor: this one is taken for having read all that it had.
        return (Reading(_moment(manifest["created_at"])),)
    return tuple(
        Reading(
            _moment(one["created_at"]),
            _moment(one["requested_at"]) if one.get("requested_at") else None,
            Watermark.parse_pg(bytes.fromhex(watermark).decode("ascii")).covers if watermark else None,
        )
        for one, watermark in (
            (manifest, manifest.get("data", {}).get("watermark")),
            *((ancestor, ancestor.get("watermark")) for ancestor in lineage),
        )
    )


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)


class Ed25519Signer:
    """The ReceiptSigner of the suite's signing key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    def sign(self, payload: bytes) -> bytes:
        """Returns 64 bytes."""
        return self._key.sign(payload)


class SystemClock:
    """The Clock of this machine."""

    def now(self) -> datetime:
        """Returns the time now, UTC."""
        return datetime.now(UTC)


class Catalogue:
    """The KnownItems of profile's catalogue. Until it was read, nothing is unknown.

    Args:
        check_seconds: between two readings; 0: it is never read.
    """

    def __init__(self, channel: grpc.Channel, check_seconds: float, max_items: int = MAX_ITEMS) -> None:
        self._stub = catalog_service_pb2_grpc.CatalogServiceStub(channel)
        self._check_seconds = check_seconds
        self._max_items = max_items
        self._known: frozenset[str] | None = None
        # Since the last reading, as examples for the log.
        self._unknown: dict[str, int] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="catalogue", daemon=True)
        self._logger = get_logger("feedback")

    def start(self) -> None:
        """Begins to read."""
        if self._check_seconds:
            self._thread.start()

    def stop(self) -> None:
        """Ends."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(_CALL_TIMEOUT_SECONDS + 1)

    def known(self) -> frozenset[str] | None:
        """Returns the ids of the catalogue; None while it cannot tell. The same object until it was read again."""
        return self._known

    def unknown_items(self, columns: EventColumns) -> dict[int, str]:
        """Returns, by row, the first item that the catalogue does not know."""
        known = self._known
        if known is None:
            return {}
        unknown: dict[int, str] = {}
        items = columns.column("item_id").tolist()
        if strange := set(items) - known - {None, ""}:
            unknown = {row: item for row, item in enumerate(items) if item in strange}
        for name in ("line_items", "impression_items"):
            for row, several in columns.sparse.get(name, {}).items():
                if row not in unknown and not known.issuperset(several):
                    unknown[row] = next(item for item in several if item not in known)
        if unknown:
            _UNKNOWN.inc(len(unknown))
            if len(self._unknown) < _TOLD_ITEMS:
                self._unknown.update(dict.fromkeys(unknown.values(), 0))
        return unknown

    def read(self) -> None:
        """Reads the catalogue; while it cannot be read, or is empty or too large, nothing is unknown."""
        known: set[str] = set()
        page_token = ""
        while not self._stopped.is_set():
            request = catalog_service_pb2.ListItemsRequest(page_size=_PAGE_ITEMS, page_token=page_token)
            answer = self._stub.ListItems(request, timeout=_CALL_TIMEOUT_SECONDS)
            known.update(item.item_id for item in answer.items)
            page_token = answer.next_page_token
            if not page_token or len(known) > self._max_items:
                break
        if not 0 < len(known) <= self._max_items:
            self._known = None
        elif self._known is None or self._known != frozenset(known):
            self._known = frozenset(known)
        if told := list(self._unknown)[:_TOLD_ITEMS]:
            self._logger.warning("events name items that the catalogue does not know", items=told)
            self._unknown = {}

    def _loop(self) -> None:
        while True:
            try:
                self.read()
            except grpc.RpcError as error:
                code = error.code() if isinstance(error, grpc.Call) else None
                self._logger.info("the catalogue cannot be read", code=code.name if code else "")
            except Exception as error:
                # The thread must live: the set would go stale, and new items would be reported for ever.
                self._known = None
                self._logger.error("reading the catalogue failed", cause=type(error).__name__)
            if self._stopped.wait(self._check_seconds):
                return
