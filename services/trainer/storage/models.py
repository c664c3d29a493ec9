"""Versions and aliases in the registry directory."""

from __future__ import annotations

from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.trainer.domain.runs import Alias, AliasChange, Model, ModelVersion
from shared.bundle import AliasState, Registry, load_bundle
from shared.bundle.manifest import CARD


class DirectoryRegistry:
    """The registry directory; implements `ports.ModelRegistry`."""

    def __init__(self, registry: Registry, public_key: Ed25519PublicKey) -> None:
        self._registry, self._public_key = registry, public_key

    def list_models(self) -> Sequence[str]:
        """See `ports.ModelRegistry`."""
        return self._registry.list_models()

    def model(self, name: str) -> Model | None:
        """See `ports.ModelRegistry`."""
        versions = self._registry.list_versions(name)
        aliases = self.aliases(name)
        if not versions and not aliases:
            return None
        return Model(name, tuple(aliases), versions[0] if versions else "", len(versions))

    def list_versions(self, model: str) -> Sequence[str]:
        """See `ports.ModelRegistry`."""
        return self._registry.list_versions(model)

    def version(self, model: str, version: str, *, with_card: bool = False) -> ModelVersion:
        """See `ports.ModelRegistry`."""
        manifest = self._registry.read_manifest(model, version, self._public_key)
        card = ""
        if with_card:
            path = self._registry.version_path(model, version) / CARD
            card = path.read_text() if path.exists() else ""
        pointing = tuple(alias.alias for alias in self.aliases(model) if alias.version == version)
        return ModelVersion(model, version, manifest, pointing, card)

    def verify(self, model: str, version: str) -> None:
        """See `ports.ModelRegistry`."""
        load_bundle(self._registry.version_path(model, version), self._public_key)

    def alias(self, model: str, alias: str) -> Alias | None:
        """See `ports.ModelRegistry`."""
        state = self._registry.alias(model, alias)
        return _alias(state) if state else None

    def aliases(self, model: str) -> Sequence[Alias]:
        """See `ports.ModelRegistry`."""
        return [_alias(state) for state in self._registry.aliases(model)]

    def point(
        self, model: str, alias: str, version: str, *, cause: str, comment: str, expected: str | None
    ) -> Alias:
        """See `ports.ModelRegistry`."""
        return _alias(
            self._registry.set_alias(
                model, alias, version, reason=cause, comment=comment, expected_current=expected
            )
        )

    def point_back(self, model: str, alias: str, *, comment: str, expected: str | None) -> Alias:
        """See `ports.ModelRegistry`."""
        return _alias(
            self._registry.roll_back_alias(model, alias, comment=comment, expected_current=expected)
        )


def _alias(state: AliasState) -> Alias:
    return Alias(
        alias=state.alias,
        version=state.version,
        previous=state.previous,
        changed_at=state.changed_at,
        cause=state.reason,
        history=tuple(
            AliasChange(change.version, change.previous, change.changed_at, change.reason, change.comment)
            for change in state.history
        ),
    )
