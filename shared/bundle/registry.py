"""Versions and aliases in a directory that anybody can read with `ls`.

    <root>/<model>/<version>/manifest.json …       a version: complete, or not there
    <root>/<model>/.staging-<version>/             a version being written
    <root>/<model>/aliases/<alias>.json            where an alias points, and has pointed
    <root>/<model>/.fence                          the greatest number of a publisher so far

A version appears by one rename and never changes. An alias changes by one
rename; two who change it at once are put in order by a lock on the directory.

Publishers that hold a lease bring the number that came with it (a fencing token). The greatest one is kept here,
and whoever comes with a smaller one is refused, under the same lock as the rename: a process that slept through
the end of its lease changes nothing, whatever it believes.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from shared.bundle.manifest import MANIFEST, NAME, check_name, damaged, read_manifest
from shared.errors import Aborted, FailedPrecondition, NotFound

PRODUCTION = "production"
STAGING_PREFIX = ".staging-"
RETIRED_PREFIX = ".retired-"
MAX_ALIAS_CHANGES = 100
ALIASES = "aliases"
FENCE = ".fence"


@dataclass(frozen=True, slots=True)
class AliasChange:
    """One change of an alias.

    Attributes:
        version: where it pointed from then on.
        previous: where a rollback from here returns; None where there is nothing before.
        changed_at: RFC 3339, UTC.
        reason: what made it change: GATE_PASSED, PROMOTED, FORCED or ROLLED_BACK.
        comment: of who changed it.
    """

    version: str
    previous: str | None
    changed_at: str
    reason: str
    comment: str = ""


@dataclass(frozen=True, slots=True)
class AliasState:
    """Where an alias points. `history` is newest first; its first entry is the current state."""

    alias: str
    version: str
    previous: str | None
    changed_at: str
    reason: str
    history: tuple[AliasChange, ...]


class Registry:
    """A registry directory. Safe to use from several threads and processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def version_path(self, model: str, version: str) -> Path:
        """Returns the directory of a version, whether it exists or not."""
        return self.root / check_name(model, "model") / check_name(version, "version")

    def list_models(self) -> list[str]:
        """Returns the names of the models that have a version or an alias, sorted."""
        return [
            name
            for name in _names_in(self.root)
            if self.list_versions(name) or (self.root / name / ALIASES).is_dir()
        ]

    def list_versions(self, model: str) -> list[str]:
        """Returns the versions of a model, newest first; empty where there is no such model."""
        directory = self.root / check_name(model, "model")
        return [
            name
            for name in reversed(_names_in(directory))
            if name != ALIASES and (directory / name / MANIFEST).is_file()
        ]

    def versions(self) -> list[tuple[str, str]]:
        """Returns (model, version) of everything here, by model, newest first."""
        return [(model, version) for model in self.list_models() for version in self.list_versions(model)]

    def read_manifest(
        self, model: str, version: str, public_key: Ed25519PublicKey | None = None
    ) -> dict[str, Any]:
        """Returns a version's manifest; with a key, only when its signature fits.

        Raises:
            NotFound: there is no such version.
            DataLoss: the manifest is damaged, or is another version's.
        """
        directory = self.version_path(model, version)
        if not (directory / MANIFEST).is_file():
            raise NotFound(
                "MODEL_VERSION_NOT_FOUND",
                f"Model {model} has no version {version}; ListModelVersions names those it has.",
                {"model": model, "version": version},
            )
        manifest = read_manifest(directory, public_key)
        if manifest.get("model") != model or manifest.get("version") != version:
            raise damaged(directory, MANIFEST, "it belongs to another model or version")
        return manifest

    def aliases(self, model: str) -> list[AliasState]:
        """Returns the aliases of a model, by name."""
        directory = self.root / check_name(model, "model") / ALIASES
        if not directory.is_dir():
            return []
        names = sorted(
            path.stem for path in directory.iterdir() if path.suffix == ".json" and NAME.fullmatch(path.stem)
        )
        return [state for name in names if (state := self.alias(model, name)) is not None]

    def alias(self, model: str, alias: str) -> AliasState | None:
        """Returns where an alias points, or None where there is no such alias.

        Raises:
            DataLoss: its file cannot be understood.
        """
        path = self._alias_path(model, alias)
        try:
            fields = json.loads(path.read_bytes())
            history = tuple(
                AliasChange(
                    version=str(change["version"]),
                    previous=change.get("previous"),
                    changed_at=str(change["changed_at"]),
                    reason=str(change["reason"]),
                    comment=str(change.get("comment", "")),
                )
                for change in fields["history"]
            )
            return AliasState(
                alias=alias,
                version=str(fields["version"]),
                previous=fields.get("previous"),
                changed_at=str(fields["changed_at"]),
                reason=str(fields["reason"]),
                history=history,
            )
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(path.parent, path.name, f"it is no alias ({error!r})") from error

    def set_alias(
        self,
        model: str,
        alias: str,
        version: str,
        *,
        reason: str,
        comment: str = "",
        expected_current: str | None = None,
        fence: int | None = None,
        now: datetime | None = None,
    ) -> AliasState:
        """Points an alias at a version and returns its state; does nothing where it points there already.

        Args:
            expected_current: where the caller believes it to point; None does not check.
            fence: as of `fenced`.
            now: defaults to the system's clock.

        Raises:
            NotFound: there is no such version.
            Aborted: it points elsewhere than `expected_current`, or LEASE_LOST.
            OSError: the disk refuses; the alias is as it was.
        """
        directory = self.version_path(model, version)
        if not (directory / MANIFEST).is_file():
            raise NotFound(
                "MODEL_VERSION_NOT_FOUND",
                f"Model {model} has no version {version}; ListModelVersions names those it has.",
                {"model": model, "version": version},
            )
        with self.fenced(model, fence), self._alias_lock(model):
            current = self.alias(model, alias)
            _check_expected(model, alias, current, expected_current)
            if current is not None and current.version == version:
                return current
            return self._write_alias(
                model, alias, current, version, current.version if current else None, reason, comment, now
            )

    def roll_back_alias(
        self,
        model: str,
        alias: str,
        *,
        comment: str = "",
        expected_current: str | None = None,
        now: datetime | None = None,
    ) -> AliasState:
        """Points an alias back at the version before and returns its state.

        Rolling back twice goes two versions back, not forth again.

        Raises:
            NotFound: there is no such alias, or the version before is gone.
            FailedPrecondition: there is no version before.
            Aborted: it points elsewhere than `expected_current`.
        """
        with self._alias_lock(model):
            current = self.alias(model, alias)
            if current is None:
                raise NotFound(
                    "ALIAS_NOT_FOUND",
                    f"Model {model} has no alias {alias}; PromoteModel creates it.",
                    {"model": model, "alias": alias},
                )
            _check_expected(model, alias, current, expected_current)
            target = current.previous
            if target is None:
                raise FailedPrecondition(
                    "NO_PREVIOUS_VERSION",
                    f"Alias {alias} of model {model} has no version before {current.version}; promote another one.",
                    {"model": model, "alias": alias},
                )
            if not (self.version_path(model, target) / MANIFEST).is_file():
                raise NotFound(
                    "MODEL_VERSION_NOT_FOUND",
                    f"Version {target} of model {model} is no longer in the registry; promote another one.",
                    {"model": model, "version": target},
                )
            # What preceded the target when it was itself promoted, so that a second rollback goes further back.
            before = next(
                (c.previous for c in current.history if c.version == target and c.reason != "ROLLED_BACK"),
                None,
            )
            return self._write_alias(model, alias, current, target, before, "ROLLED_BACK", comment, now)

    def raise_fence(self, model: str, fence: int) -> None:
        """Refuses publishers with smaller numbers from now on.

        Raises:
            Aborted: LEASE_LOST: a greater number has been here.
            OSError: the disk refuses; the fence is as it was.
        """
        (self.root / check_name(model, "model")).mkdir(parents=True, exist_ok=True)
        with self.fenced(model, fence):
            write_atomically(self.root / model / FENCE, f"{fence}\n".encode())

    @contextmanager
    def fenced(self, model: str, fence: int | None) -> Iterator[None]:
        """Holds the model's lock while a publisher changes something; None, for who has no lease, checks nothing.

        Raises:
            Aborted: LEASE_LOST: a greater number has been here.
            DataLoss: the fence cannot be understood.
        """
        if fence is None:
            yield
            return
        directory = self.root / check_name(model, "model")
        with _lock(directory):
            try:
                greatest = int((directory / FENCE).read_text())
            except FileNotFoundError:
                greatest = 0
            except ValueError as error:
                raise damaged(directory, FENCE, "it is no number") from error
            if fence < greatest:
                raise Aborted(
                    "LEASE_LOST",
                    f"Another process has taken the publishing lease of model {model}; nothing was changed. Start the "
                    "run again.",
                    {"model": model},
                )
            yield

    def retire(self, model: str, version: str) -> bool:
        """Removes a version that no alias names; returns whether it is gone.

        Under the lock of the aliases, so that a version is never promoted and removed at once. A crash leaves a
        hidden directory that the next call for the model removes.
        """
        path = self.version_path(model, version)
        with self._alias_lock(model):
            for abandoned in path.parent.glob(f"{RETIRED_PREFIX}*"):
                shutil.rmtree(abandoned, ignore_errors=True)
            if any(state.version == version for state in self.aliases(model)):
                return False
            if not path.is_dir():
                return True
            retired = path.with_name(RETIRED_PREFIX + version)
            os.replace(path, retired)
            fsync_directory(path.parent)
        shutil.rmtree(retired, ignore_errors=True)
        return True

    def remove_abandoned_staging(self, model: str) -> list[str]:
        """Removes what interrupted writers left and returns its names.

        Only for who holds the model's publishing lease: a living writer's staging would go too.
        """
        directory = self.root / check_name(model, "model")
        if not directory.is_dir():
            return []
        abandoned = sorted(path for path in directory.iterdir() if path.name.startswith(STAGING_PREFIX))
        for path in abandoned:
            shutil.rmtree(path, ignore_errors=True)
        return [path.name for path in abandoned]

    def _alias_path(self, model: str, alias: str) -> Path:
        return self.root / check_name(model, "model") / ALIASES / f"{check_name(alias, 'alias')}.json"

    def _write_alias(
        self,
        model: str,
        alias: str,
        current: AliasState | None,
        version: str,
        previous: str | None,
        reason: str,
        comment: str,
        now: datetime | None,
    ) -> AliasState:
        changed_at = (now or datetime.now(UTC)).isoformat(timespec="microseconds")
        change = AliasChange(version, previous, changed_at, reason, comment)
        history = (change, *(current.history if current else ()))[:MAX_ALIAS_CHANGES]
        state = AliasState(alias, version, previous, changed_at, reason, history)
        fields = {name: value for name, value in asdict(state).items() if name != "alias"}
        write_atomically(self._alias_path(model, alias), json.dumps(fields, indent=1).encode())
        return state

    @contextmanager
    def _alias_lock(self, model: str) -> Iterator[None]:
        directory = self.root / check_name(model, "model") / ALIASES
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory):
            yield


@contextmanager
def _lock(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file by one rename, on disk before it returns; on failure the old one stays."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def fsync_directory(directory: Path) -> None:
    """Makes renames within a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _names_in(directory: Path) -> list[str]:
    try:
        return sorted(
            entry.name for entry in os.scandir(directory) if NAME.fullmatch(entry.name) and entry.is_dir()
        )
    except FileNotFoundError:
        return []


def _check_expected(model: str, alias: str, current: AliasState | None, expected: str | None) -> None:
    actual = current.version if current else ""
    if expected is not None and actual != expected:
        raise Aborted(
            "ALIAS_CHANGED",
            f"Alias {alias} of model {model} points at {actual or 'nothing'}, not at {expected}; read it again.",
            {"model": model, "alias": alias, "version": actual},
        )
