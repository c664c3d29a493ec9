"""What lies outside of the database: the model registry, the signing key, the clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.feedback.domain.consent import ModelVersion
from shared.bundle.registry import Registry
from shared.errors import ShopkeeperError
from shared.telemetry import get_logger

PRODUCTION = "production"


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
                created_at = datetime.fromisoformat(manifest["created_at"])
                aliases = {state.alias: state.version for state in self._registry.aliases(model)}
            except (ShopkeeperError, KeyError, TypeError, ValueError) as error:
                self._logger.warning(
                    "model version left out of a receipt", model=model, version=version, cause=repr(error)
                )
                continue
            if created_at.tzinfo is None:
                created_at = created_at.replace(tzinfo=UTC)
            created_at = created_at.astimezone(UTC)
            retire_at = (
                created_at + timedelta(days=self._retention_days)
                if self._retention_days and version not in aliases.values()
                else None
            )
            in_service = aliases.get(PRODUCTION) == version
            versions.append(ModelVersion(model, version, created_at, in_service, retire_at))
        return versions


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
