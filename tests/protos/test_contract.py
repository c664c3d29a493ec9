"""The contract's promises: reproducible, linted, unbroken, documented, installable on its own."""

from __future__ import annotations

import filecmp
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from google.api import field_behavior_pb2
from google.protobuf import descriptor_pb2

from protos import generate

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "contract.binpb"
    generate.describe(path)
    return path


def buf(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    config = generate.PROTOS / "buf.yaml"
    return subprocess.run(
        [BIN / "buf", *map(str, arguments), "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )


def read(image: Path) -> descriptor_pb2.FileDescriptorSet:
    return descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes())


def own_files(image: Path) -> list[descriptor_pb2.FileDescriptorProto]:
    return [file for file in read(image).file if file.name.startswith("shopkeeper/")]


def test_the_stubs_are_what_the_protos_say_byte_for_byte(tmp_path: Path) -> None:
    generate.generate(tmp_path)
    committed = generate.PROTOS / "python"
    fresh = {p.relative_to(tmp_path) for p in tmp_path.rglob("*.py*") if "__pycache__" not in p.parts}
    kept = {
        p.relative_to(committed)
        for p in (committed / "shopkeeper").rglob("*.py*")
        if "__pycache__" not in p.parts
    }
    assert {str(p) for p in fresh ^ kept} <= {"shopkeeper/py.typed"}
    different = [str(p) for p in fresh if not filecmp.cmp(tmp_path / p, committed / p, shallow=False)]
    assert not different, "run `make protos`"


def test_the_contract_passes_the_linter(image: Path) -> None:
    outcome = buf("lint", image)
    assert outcome.returncode == 0, outcome.stdout


def test_the_linter_would_see_an_undocumented_element(image: Path, tmp_path: Path) -> None:
    contract = read(image)
    file = next(file for file in contract.file if file.name.endswith("event_kind.proto"))
    for location in file.source_code_info.location:
        location.ClearField("leading_comments")
    (tmp_path / "broken.binpb").write_bytes(contract.SerializeToString())
    assert buf("lint", tmp_path / "broken.binpb").returncode != 0


def test_the_contract_breaks_nothing_that_was_released(image: Path) -> None:
    outcome = buf("breaking", image, "--against", generate.RELEASED)
    assert outcome.returncode == 0, outcome.stdout


def test_the_breaking_check_would_see_a_removed_field(image: Path, tmp_path: Path) -> None:
    contract = read(image)
    file = next(file for file in contract.file if file.name.endswith("recommend_service.proto"))
    message = next(m for m in file.message_type if m.name == "RecommendRequest")
    del message.field[-1]
    (tmp_path / "broken.binpb").write_bytes(contract.SerializeToString())
    assert buf("breaking", tmp_path / "broken.binpb", "--against", image).returncode != 0


def test_every_field_of_every_request_says_whether_it_is_required(image: Path) -> None:
    silent = [
        f"{file.package}.{message.name}.{field.name}"
        for file in own_files(image)
        for message in file.message_type
        if message.name.endswith("Request")
        for field in message.field
        if not field.options.Extensions[field_behavior_pb2.field_behavior]
    ]
    assert silent == []


@pytest.mark.parametrize("package", generate.PACKAGES)
def test_every_service_documents_its_reasons_for_failure(image: Path, package: str) -> None:
    reasons = [
        value.name
        for file in own_files(image)
        if file.package == f"shopkeeper.{package}.v1"
        for enum in file.enum_type
        if enum.name == "ErrorReason"
        for value in enum.value
    ]
    assert reasons[0] == "ERROR_REASON_UNSPECIFIED"
    assert len(reasons) > 3


@pytest.mark.slow
def test_the_stubs_install_on_their_own_with_type_information(tmp_path: Path) -> None:
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, generate.PROTOS / "python"],
        check=True,
    )
    (wheel,) = wheels.glob("shopkeeper_protos-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "shopkeeper/py.typed" in names
    assert "shopkeeper/recommend/v1/recommend_service_pb2.pyi" in names
    subprocess.run([*pip, "install", "--no-deps", "--target", target, wheel], check=True)
    program = (
        "import shopkeeper.recommend.v1.recommend_service_pb2_grpc as stubs, shopkeeper;"
        "print(shopkeeper.__file__, stubs.RecommendServiceStub.__name__)"
    )
    outcome = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(target) in outcome.stdout
    assert "RecommendServiceStub" in outcome.stdout
