"""Generates the Python stubs of the contract into protos/python.

The output is committed, so that an integrator needs no protobuf compiler; a
test regenerates it and compares byte for byte.

Usage: python protos/generate.py [--out DIRECTORY] [PACKAGE ...]
       python protos/generate.py --release

`--release` makes the contract as it is now the one that later changes must not
break; do it when a version of the suite is released.
"""

from __future__ import annotations

import argparse
import sys
from importlib import resources
from pathlib import Path

from google.api import annotations_pb2
from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
RELEASED = PROTOS / "released.binpb"
PACKAGES = ("feedback", "profile", "trainer", "recommend")


def include_flags() -> list[str]:
    """Returns the -I flags: this contract, googleapis, and protobuf's own types."""
    googleapis = Path(annotations_pb2.__file__).parents[2]
    well_known = Path(str(resources.files("grpc_tools"))) / "_proto"
    return [f"-I{PROTOS}", f"-I{googleapis}", f"-I{well_known}"]


def sources(packages: tuple[str, ...] = PACKAGES) -> list[str]:
    """Returns the .proto files of the packages, relative to protos/, sorted."""
    found = [p for name in packages for p in (PROTOS / "shopkeeper" / name).rglob("*.proto")]
    return sorted(str(p.relative_to(PROTOS)) for p in found)


def generate(out: Path, packages: tuple[str, ...] = PACKAGES) -> None:
    """Writes stubs with type information under `out`.

    Raises:
        SystemExit: the compiler refused a file; its message is on stderr.
    """
    plugin = Path(sys.executable).parent
    out.mkdir(parents=True, exist_ok=True)
    status = protoc.main(
        [
            "protoc",
            *include_flags(),
            f"--plugin=protoc-gen-mypy={plugin / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={plugin / 'protoc-gen-mypy_grpc'}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out=quiet:{out}",
            f"--mypy_grpc_out=quiet:{out}",
            *sources(packages),
        ]
    )
    if status:
        raise SystemExit(status)
    # Every directory is a regular package, so that no installed namespace can shadow it.
    for directory in [out / "shopkeeper", *(p for p in (out / "shopkeeper").rglob("*") if p.is_dir())]:
        if directory.name != "__pycache__":
            (directory / "__init__.py").touch()
    (out / "shopkeeper" / "py.typed").touch()


def describe(image: Path, *, source_info: bool = True) -> None:
    """Writes the descriptors of the contract and of all that it imports, for buf.

    Raises:
        SystemExit: the compiler refused a file; its message is on stderr.
    """
    flags = ["--include_imports", f"--descriptor_set_out={image}"]
    if source_info:
        flags.append("--include_source_info")
    if status := protoc.main(["protoc", *include_flags(), *flags, *sources()]):
        raise SystemExit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PROTOS / "python")
    parser.add_argument("--release", action="store_true", help="write the baseline of the breaking check")
    parser.add_argument("packages", nargs="*", default=PACKAGES, metavar="PACKAGE")
    arguments = parser.parse_args()
    if arguments.release:
        describe(RELEASED, source_info=False)
        return
    generate(arguments.out, tuple(arguments.packages))


if __name__ == "__main__":
    main()
