"""Keeps a registry directory and one in object storage alike: `python -m shared.registry_mirror pull|push [--once]`.

Services read a directory; where pods share none, each has a copy of its own, and this runs beside it. `pull` fetches
versions and aliases; `push` sends those of the one writer. Anything that fsspec opens will do as
SHOPKEEPER_REGISTRY_URL: `s3://bucket/registry`, `gs://…`, `az://…`, a path.

The order makes a half-done transfer invisible, as the registry's own renames do: a version's manifest goes last, and an
alias after the version that it names. Versions never change and are never removed here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import Field

from shared.bundle.manifest import MANIFEST, NAME
from shared.bundle.registry import ALIASES, STAGING_PREFIX
from shared.errors import DataLoss, FailedPrecondition, ShopkeeperError, Unavailable
from shared.settings import ServiceSettings, load_settings
from shared.telemetry import configure_logging, get_logger

FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,127}")


class MirrorSettings(ServiceSettings):
    """Settings of the mirror, beside those of every service."""

    registry_url: str = Field(
        "", description="Where the registry lies in object storage, as fsspec opens it."
    )
    registry_mirror_seconds: float = Field(5.0, gt=0, description="Time between two looks.")


class Mirror:
    """One registry directory, and its counterpart.

    Args:
        root: the directory.
        remote: a file system of fsspec.
        base: the counterpart's path in it.
    """

    def __init__(self, root: Path, remote: Any, base: str) -> None:
        self._root, self._remote, self._base = root, remote, base.rstrip("/")

    def pull(self) -> int:
        """Fetches versions that are not here, then aliases; returns how many files of either kind changed.

        Raises:
            DataLoss: a file is not what its manifest says; what is here stays.
            Unavailable: the storage cannot be reached.
        """
        return self._guarded(self._pull)

    def push(self) -> int:
        """Sends versions that are not there, then aliases; returns how many changed. Fails as `pull` does."""
        return self._guarded(self._push)

    def _guarded(self, transfer: Any) -> int:
        try:
            changed: int = transfer()
            return changed
        except ShopkeeperError:
            raise
        # Each storage's driver has exceptions of its own, by no means all of them an OSError.
        except Exception as error:
            raise Unavailable(
                "REGISTRY_UNAVAILABLE",
                f"The registry in object storage cannot be used now: {type(error).__name__}: {error}. "
                "Check SHOPKEEPER_REGISTRY_URL and its credentials.",
            ) from error

    def _pull(self) -> int:
        changed = 0
        for model in self._remote_names(""):
            for version in self._remote_names(model):
                if version == ALIASES or (self._root / model / version).exists():
                    continue
                if self._remote.exists(self._path(model, version, MANIFEST)):
                    self._fetch(model, version)
                    changed += 1
            for path in self._remote_files(self._path(model, ALIASES)):
                content = self._remote.cat_file(path)
                if self._take_alias(model, PurePosixPath(path).name, content):
                    changed += 1
        return changed

    def _fetch(self, model: str, version: str) -> None:
        staging = self._root / model / f"{STAGING_PREFIX}pull-{version}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        remote = self._path(model, version)
        for path in self._remote_files(remote):
            name = PurePosixPath(path).name
            if FILE_NAME.fullmatch(name):
                self._remote.get_file(path, str(staging / name))
        manifest = json.loads((staging / MANIFEST).read_bytes())
        for name, entry in manifest["files"].items():
            expected = entry["sha256"] if isinstance(entry, dict) else entry
            target = staging / PurePosixPath(name).name
            if not target.is_file() or hashlib.sha256(target.read_bytes()).hexdigest() != expected:
                shutil.rmtree(staging, ignore_errors=True)
                raise DataLoss("BUNDLE_DAMAGED", f"{model}/{version}/{name} is not what its manifest says.")
        staging.rename(self._root / model / version)

    def _take_alias(self, model: str, name: str, content: bytes) -> bool:
        target = self._root / model / ALIASES / name
        if target.exists() and target.read_bytes() == content:
            return False
        if not (self._root / model / str(json.loads(content)["version"])).is_dir():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{name}.{os.getpid()}")
        staged.write_bytes(content)
        staged.replace(target)
        return True

    def _push(self) -> int:
        changed = 0
        for model in sorted(
            path for path in self._root.iterdir() if path.is_dir() and not path.name.startswith(".")
        ):
            sent = set()
            for version in sorted(path for path in model.iterdir() if path.is_dir()):
                if (
                    version.name == ALIASES
                    or not (version / MANIFEST).is_file()
                    or version.name.startswith(".")
                ):
                    continue
                sent.add(version.name)
                if self._remote.exists(self._path(model.name, version.name, MANIFEST)):
                    continue
                self._remote.makedirs(self._path(model.name, version.name), exist_ok=True)
                files = sorted(path for path in version.iterdir() if path.is_file() and path.name != MANIFEST)
                for path in [*files, version / MANIFEST]:
                    self._remote.put_file(str(path), self._path(model.name, version.name, path.name))
                changed += 1
            for alias in sorted((model / ALIASES).glob("*.json")):
                content = alias.read_bytes()
                target = self._path(model.name, ALIASES, alias.name)
                # One that was published since the versions were listed goes with the next look.
                if json.loads(content)["version"] not in sent:
                    continue
                if not self._remote.exists(target) or self._remote.cat_file(target) != content:
                    self._remote.makedirs(self._path(model.name, ALIASES), exist_ok=True)
                    self._remote.pipe_file(target, content)
                    changed += 1
        return changed

    def _path(self, *parts: str) -> str:
        return "/".join((self._base, *(part for part in parts if part)))

    def _remote_names(self, *parts: str) -> Iterator[str]:
        for name in self._listed(self._path(*parts), "directory"):
            last = PurePosixPath(name).name
            # Names come from outside: one that is no name of ours could lead out of the directory.
            if NAME.fullmatch(last):
                yield last

    def _remote_files(self, path: str) -> list[str]:
        return sorted(self._listed(path, "file"), key=lambda name: name.endswith(MANIFEST))

    def _listed(self, path: str, kind: str) -> list[str]:
        self._remote.invalidate_cache()
        try:
            return sorted(
                entry["name"] for entry in self._remote.ls(path, detail=True) if entry["type"] == kind
            )
        except FileNotFoundError:
            return []


def open_mirror(settings: MirrorSettings) -> Mirror:
    """Returns the mirror of the settings.

    Raises:
        FailedPrecondition: no URL, or one that nothing installed here opens.
    """
    if not settings.registry_url:
        raise FailedPrecondition(
            "REGISTRY_URL_MISSING", "Set SHOPKEEPER_REGISTRY_URL, such as s3://bucket/registry."
        )
    import fsspec

    try:
        remote, base = fsspec.core.url_to_fs(settings.registry_url)
    except (ImportError, ValueError) as error:
        raise FailedPrecondition(
            "REGISTRY_URL_UNUSABLE",
            f"{settings.registry_url} cannot be opened: {error}. Is its package installed?",
        ) from error
    settings.registry_path.mkdir(parents=True, exist_ok=True)
    return Mirror(settings.registry_path, remote, base)


def main(arguments: list[str]) -> int:
    """Runs until it is ended, or once."""
    if arguments[:1] not in (["pull"], ["push"]) or arguments[1:] not in ([], ["--once"]):
        print(__doc__, file=sys.stderr)
        return 2
    settings = load_settings(MirrorSettings)
    configure_logging("registry-mirror", settings.log_level, settings.log_format)
    logger = get_logger("registry-mirror")
    try:
        mirror = open_mirror(settings)
        while True:
            try:
                if changed := getattr(mirror, arguments[0])():
                    logger.info("registry mirrored", direction=arguments[0], changed=changed)
            except ShopkeeperError as error:
                if "--once" in arguments:
                    raise
                logger.error("registry not mirrored", reason=error.reason, message=error.message)
            if "--once" in arguments:
                return 0
            time.sleep(settings.registry_mirror_seconds)
    except ShopkeeperError as error:
        print(f"{error.reason}: {error.message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
