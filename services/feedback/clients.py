"""What lies outside of the database: the model registry, the signing key, the clock."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.feedback.domain.consent import ModelVersion
from shared.bundle.registry import Registry
from shared.errors import ShopkeeperError
from shared.telemetry import get_logger

PRODUCTION = "production"


class RegistryModelVersions:
    """The ModelVersions of a registry directory."""

    def __init__(self, registry: Path) -> None:
        self._registry = Registry(registry)
        self._logger = get_logger("feedback")

    def list_versions(self) -> list[ModelVersion]:
        """Returns every version whose manifest can be read."""
        versions = []
        for model, version in self._registry.versions():
            try:
                manifest = self._registry.read_manifest(model, version)
                created_at = datetime.fromisoformat(manifest["created_at"])
                alias = self._registry.alias(model, PRODUCTION)
            except (ShopkeeperError, KeyError, TypeError, ValueError) as error:
                self._logger.warning(
                    "model version left out of a receipt", model=model, version=version, cause=repr(error)
                )
                continue
            if created_at.tzinfo is None:
                created_at = created_at.replace(tzinfo=UTC)
            in_service = alias is not None and alias.version == version
            versions.append(ModelVersion(model, version, created_at.astimezone(UTC), in_service))
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
