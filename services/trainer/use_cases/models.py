"""Versions and aliases: read, promote, roll back, watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from services.trainer.domain.runs import Alias, Model, ModelVersion
from services.trainer.ports import ModelRegistry
from services.trainer.use_cases.pages import Page
from shared.errors import Aborted, DataLoss, FailedPrecondition, FieldViolation, InvalidInput, NotFound


class Models:
    """Versions and aliases: read, promote, roll back, watch."""

    def __init__(self, registry: ModelRegistry, *, wait: Callable[[float], None]) -> None:
        self._registry, self._wait = registry, wait

    def list(self, page_size: int, after: str) -> Page[Model]:
        """Returns a page of models by name, after that name."""
        names = [name for name in self._registry.list_models() if name > after]
        models = [self.get(name) for name in names[:page_size]]
        return Page(models, len(names) > page_size)

    def get(self, name: str) -> Model:
        """Returns a model; raises NotFound."""
        model = self._registry.model(name)
        if model is None:
            raise NotFound(
                "MODEL_NOT_FOUND",
                f"There is no model {name} yet; CreateTrainingRun makes its first version.",
                {"model": name},
            )
        return model

    def list_versions(
        self, model: str, page_size: int, before: str
    ) -> tuple[Page[ModelVersion], Sequence[str]]:
        """Returns a page of versions, newest first, older than `before`; and which of the page are damaged."""
        self.get(model)
        names = [name for name in self._registry.list_versions(model) if not before or name < before]
        found, damaged = [], []
        for name in names[:page_size]:
            try:
                found.append(self._registry.version(model, name))
            except DataLoss:
                damaged.append(name)
        return Page(found, len(names) > page_size), damaged

    def get_version(self, model: str, version_or_alias: str) -> ModelVersion:
        """Returns a version, named by itself or by an alias, with its card."""
        self.get(model)
        alias = self._registry.alias(model, version_or_alias)
        return self._registry.version(model, alias.version if alias else version_or_alias, with_card=True)

    def promote(
        self, model: str, version: str, alias: str, *, force: bool, comment: str, expected: str | None
    ) -> Model:
        """Points an alias at a version.

        Raises:
            NotFound: there is no such version.
            DataLoss: it would not load.
            FailedPrecondition: GATE_FAILED, and not `force`.
            InvalidInput: `force` without a comment.
            Aborted: the alias does not point at `expected`.
        """
        if force and not comment:
            problem = "must say why when force is set; it is kept in the alias's history."
            raise InvalidInput(
                "INVALID_REQUEST", f"comment {problem}", {}, [FieldViolation("comment", problem)]
            )
        found = self._registry.version(model, version)
        self._registry.verify(model, version)
        passed = found.verdict != "FAILED"
        if not passed and not force:
            raise FailedPrecondition(
                "GATE_FAILED",
                f"The gate failed version {version}: {'; '.join(found.gate_reasons) or 'no verdict'}. Promote "
                "another version, or set force and say why.",
                {"model": model, "version": version, "verdict": found.verdict},
            )
        cause = "PROMOTED" if passed else "FORCED"
        self._registry.point(model, alias, version, cause=cause, comment=comment, expected=expected)
        return self.get(model)

    def roll_back(self, model: str, alias: str, *, comment: str, expected: str | None) -> Model:
        """Points an alias at the version before, which must still load."""
        current = self._registry.alias(model, alias)
        if current is not None and current.previous is not None:
            if expected is not None and current.version != expected:
                raise Aborted(
                    "ALIAS_CHANGED",
                    f"Alias {alias} of model {model} points at {current.version}, not at {expected}; read it again.",
                    {"model": model, "alias": alias, "version": current.version},
                )
            self._registry.verify(model, current.previous)
        self._registry.point_back(model, alias, comment=comment, expected=expected)
        return self.get(model)

    def watch_aliases(
        self, model: str, is_wanted: Callable[[], bool]
    ) -> Iterator[tuple[str, Alias | None, bool]]:
        """Yields (model, alias, snapshot complete): every alias, then each change, and heartbeats between."""
        known: dict[tuple[str, str], str] = {}
        complete = False
        quiet_seconds = 0.0
        while is_wanted():
            for name in [model] if model else self._registry.list_models():
                for alias in self._registry.aliases(name):
                    if known.get((name, alias.alias)) != alias.changed_at:
                        known[name, alias.alias] = alias.changed_at
                        quiet_seconds = 0.0
                        yield name, alias, complete
            if not complete or quiet_seconds >= 5.0:
                complete, quiet_seconds = True, 0.0
                yield "", None, True
            self._wait(0.5)
            quiet_seconds += 0.5
