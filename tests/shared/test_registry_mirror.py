"""A registry in object storage and its copies: a half-done transfer is never seen, and what is damaged is not taken."""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest

from shared.errors import DataLoss, Unavailable
from shared.registry_mirror import Mirror, main


@pytest.fixture
def bucket() -> tuple[Any, str]:
    """A file system in memory, as another machine's would be."""
    return fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}/registry"


def publish(root: Path, version: str, content: bytes = b"weights", model: str = "main") -> None:
    directory = root / model / version
    directory.mkdir(parents=True)
    (directory / "weights.safetensors").write_bytes(content)
    manifest = {"files": {"weights.safetensors": {"sha256": hashlib.sha256(content).hexdigest()}}}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def point(root: Path, version: str, model: str = "main") -> None:
    aliases = root / model / "aliases"
    aliases.mkdir(parents=True, exist_ok=True)
    (aliases / "production.json").write_text(json.dumps({"version": version}))


def everything(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_what_the_writer_publishes_reaches_every_copy(tmp_path: Path, bucket: tuple[Any, str]) -> None:
    writer, reader = tmp_path / "writer", tmp_path / "reader"
    publish(writer, "v1")
    point(writer, "v1")
    (writer / "main" / ".staging-v2").mkdir()
    reader.mkdir()
    assert Mirror(writer, *bucket).push() == 2
    assert Mirror(reader, *bucket).pull() == 2
    assert everything(reader) == everything(writer)
    assert Mirror(writer, *bucket).push() == Mirror(reader, *bucket).pull() == 0
    publish(writer, "v2", b"others")
    point(writer, "v2")
    Mirror(writer, *bucket).push()
    Mirror(reader, *bucket).pull()
    assert everything(reader) == everything(writer)


class _Failing:
    """A file system that fails after so many writes."""

    def __init__(self, remote: Any, writes: int, failure: Exception) -> None:
        self._remote, self._writes, self._failure = remote, writes, failure

    def __getattr__(self, name: str) -> Any:
        return getattr(self._remote, name)

    def put_file(self, *arguments: Any) -> None:
        if self._writes == 0:
            raise self._failure
        self._writes -= 1
        self._remote.put_file(*arguments)


class _DriverError(Exception):
    """As botocore's: no OSError."""


@pytest.mark.parametrize("writes", [0, 1])
@pytest.mark.parametrize("failure", [ConnectionError("the network is away"), _DriverError("no endpoint")])
def test_a_push_that_is_cut_short_is_not_seen_and_goes_on(
    tmp_path: Path, bucket: tuple[Any, str], writes: int, failure: Exception
) -> None:
    writer, reader = tmp_path / "writer", tmp_path / "reader"
    publish(writer, "v1")
    point(writer, "v1")
    reader.mkdir()
    with pytest.raises(Unavailable):
        Mirror(writer, _Failing(bucket[0], writes, failure), bucket[1]).push()
    Mirror(reader, *bucket).pull()
    assert everything(reader) == {}
    Mirror(writer, *bucket).push()
    Mirror(reader, *bucket).pull()
    assert everything(reader) == everything(writer)


def test_a_damaged_version_is_not_taken_and_the_alias_stays(tmp_path: Path, bucket: tuple[Any, str]) -> None:
    writer, reader = tmp_path / "writer", tmp_path / "reader"
    publish(writer, "v1")
    point(writer, "v1")
    reader.mkdir()
    Mirror(writer, *bucket).push()
    Mirror(reader, *bucket).pull()
    before = everything(reader)
    publish(writer, "v2", b"others")
    point(writer, "v2")
    Mirror(writer, *bucket).push()
    bucket[0].pipe_file(f"{bucket[1]}/main/v2/weights.safetensors", b"tampered")
    with pytest.raises(DataLoss):
        Mirror(reader, *bucket).pull()
    assert everything(reader) == before


def test_names_that_lead_out_of_the_registry_are_not_followed(
    tmp_path: Path, bucket: tuple[Any, str]
) -> None:
    reader = tmp_path / "reader"
    reader.mkdir()
    remote, base = bucket
    for name in ("Upper", ".hidden", "a b"):
        remote.pipe_file(f"{base}/main/{name}/manifest.json", json.dumps({"files": {}}).encode())
    publish(tmp_path / "writer", "v1")
    Mirror(tmp_path / "writer", *bucket).push()
    Mirror(reader, *bucket).pull()
    assert {path.split("/")[1] for path in everything(reader)} == {"v1"}


def test_the_command_mirrors_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(tmp_path / "registry", "v1")
    monkeypatch.setenv("SHOPKEEPER_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("SHOPKEEPER_REGISTRY_URL", f"file://{tmp_path}/bucket")
    assert main(["push", "--once"]) == 0
    assert (tmp_path / "bucket" / "main" / "v1" / "manifest.json").exists()
    assert main(["sideways"]) == 2
    monkeypatch.setenv("SHOPKEEPER_REGISTRY_URL", "nothing-like-that://x")
    assert main(["pull", "--once"]) == 2
