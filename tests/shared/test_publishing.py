"""Killed, out of disk or out of date: a registry is as it was, or holds the new version whole."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shared.bundle import Registry, load_bundle
from shared.bundle.manifest import check_name
from shared.errors import Aborted, DataLoss, InvalidInput
from tests.shared.test_bundle import KEY, publish


def tree(root: Path) -> dict[str, str]:
    """Returns what a reader of the registry may see: digests of all files that are not of a writer at work."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    }


def publish_and_promote(registry: Registry, fence: int | None = None) -> str:
    version = publish(registry, fence=fence)
    registry.set_alias("main", "production", version, reason="GATE_PASSED", fence=fence)
    return version


def steps_until(limit: int) -> Iterator[None]:
    """Patches what a publisher does to the disk, so that the process dies at step `limit`."""
    done = 0

    def counted(function):  # type: ignore[no-untyped-def]
        def call(*arguments, **options):  # type: ignore[no-untyped-def]
            nonlocal done
            if done == limit:
                os._exit(9)
            done += 1
            return function(*arguments, **options)

        return call

    for module, name in (
        (os, "fsync"), (os, "rename"), (os, "replace"), (os, "open"), (os, "mkdir"), (Path, "open"), (Path, "mkdir"),
    ):  # fmt: skip
        setattr(module, name, counted(getattr(module, name)))
    yield


def test_a_publisher_killed_at_any_step_leaves_nothing_that_anybody_sees_or_a_whole_version(
    tmp_path: Path,
) -> None:
    registry = Registry(tmp_path / "registry")
    first = publish_and_promote(registry, fence=1)
    outcomes = []
    for step in range(1000):
        before, versions = tree(registry.root), registry.list_versions("main")
        child = os.fork()
        if child == 0:
            try:
                next(steps_until(step))
                publish_and_promote(Registry(registry.root), fence=2 + step)
                os._exit(0)
            except BaseException:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 9)
        appeared = set(registry.list_versions("main")) - set(versions)
        for version in appeared:
            load_bundle(registry.version_path("main", version), KEY.public_key())
        state = registry.alias("main", "production")
        assert state is not None
        load_bundle(registry.version_path("main", state.version), KEY.public_key())
        if not appeared:
            assert tree(registry.root) == before
        registry.remove_abandoned_staging("main")
        assert [p.name for p in (registry.root / "main").iterdir() if p.name.startswith(".staging")] == []
        outcomes.append((code, bool(appeared), state.version in appeared))
        if code == 0:
            break
    # It was killed before the version appeared, between that and the alias, and in the end not at all.
    assert {(9, False, False), (9, True, False), (0, True, True)} <= set(outcomes)
    assert first in registry.list_versions("main")


def fill(path: Path) -> None:
    """Writes until nothing more fits."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_full_at_any_write_leaves_the_registry_as_it_was(small_disk: Path) -> None:
    registry = Registry(small_disk / "registry")
    publish_and_promote(registry, fence=1)
    outcomes = set()
    filler = small_disk / "filler"
    for free in range(0, 96, 4):
        fill(filler)
        os.truncate(filler, filler.stat().st_size // 4096 * 4096 - free * 1024)
        before = tree(registry.root)
        try:
            registry.raise_fence("main", 2 + free)
            version = publish_and_promote(registry, fence=2 + free)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
            appeared = {k: v for k, v in tree(registry.root).items() if before.get(k) != v}
            # At most the whole new version, which an operator can promote when there is room; never a part of it.
            names = {key.split("/")[1] for key in appeared}
            assert len(names) <= 1
            for name in names:
                load_bundle(registry.version_path("main", name), KEY.public_key())
            assert [p.name for p in (registry.root / "main").iterdir() if p.name.startswith(".staging")] == []
            outcomes.add(f"refused, {len(names)} new")
        else:
            state = registry.alias("main", "production")
            assert state is not None
            assert state.version == version
            outcomes.add("published")
        filler.unlink()
        for old in registry.list_versions("main")[1:]:
            if (state := registry.alias("main", "production")) and state.version != old:
                subprocess.run(["rm", "-r", str(registry.version_path("main", old))], check=True)
    assert {"refused, 0 new", "published"} <= outcomes


def test_who_slept_through_the_end_of_a_lease_publishes_nothing_and_moves_no_alias(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    old = publish_and_promote(registry, fence=1)
    registry.raise_fence("main", 5)
    before = tree(registry.root)
    asleep, awake = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def sleeper() -> None:
        def fall_asleep() -> None:
            asleep.set()
            awake.wait(10)

        try:
            publish(registry, fence=5, before_publish=fall_asleep)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=sleeper)
    thread.start()
    assert asleep.wait(10)
    # Everything of the sleeper's is on disk but the rename, when the next holder comes.
    registry.raise_fence("main", 6)
    awake.set()
    thread.join()
    assert [getattr(error, "reason", error) for error in failures] == ["LEASE_LOST"]
    with pytest.raises(Aborted, match="lease"):
        registry.set_alias("main", "production", old, reason="GATE_PASSED", fence=5)
    with pytest.raises(Aborted, match="lease"):
        registry.raise_fence("main", 5)
    assert tree(registry.root) == before
    assert not [p for p in (registry.root / "main").iterdir() if p.name.startswith(".staging")]
    newer = publish_and_promote(registry, fence=6)
    state = registry.alias("main", "production")
    assert state is not None
    assert state.version == newer


def test_a_fence_that_is_no_number_lets_nobody_through(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    publish_and_promote(registry, fence=1)
    (registry.root / "main" / ".fence").write_text("x")
    with pytest.raises(DataLoss):
        publish(registry, fence=7)
    # An operator without a lease can still promote.
    (version,) = registry.list_versions("main")
    registry.set_alias("main", "canary", version, reason="PROMOTED")


@pytest.mark.parametrize("name", ["", "Main", "-main", "ma/in", "..", "main\n", "m" * 64, "é", "a b", "a\0"])
def test_nothing_else_ever_becomes_a_path(name: str, tmp_path: Path) -> None:
    for field in ("model", "version", "alias"):
        with pytest.raises(InvalidInput):
            check_name(name, field)
    with pytest.raises(InvalidInput):
        Registry(tmp_path).version_path(name, "v1")
    with pytest.raises(InvalidInput):
        Registry(tmp_path).raise_fence(name, 1)
    assert list(tmp_path.iterdir()) == []
