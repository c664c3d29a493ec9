"""No bundle that differs from what was signed is ever loaded. `make verify-bundles` tries 10,000."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.bundle.manifest import MANIFEST, sign_manifest
from shared.bundle.reader import load_bundle
from shared.bundle.registry import Registry
from shared.errors import DataLoss
from shared.keys import read_verifying_key
from tests.recommend.shop import publish
from tests.recommend.test_service import IDS, VECTORS
from tests.shared.test_ranker import made_ranker

MUTANTS = int(os.environ.get("SHOPKEEPER_MUTATED_BUNDLES", "400"))
Mutation = Callable[[np.random.Generator, Path, Path], bool]


def some_file(random: np.random.Generator, bundle: Path) -> Path:
    return random.choice(np.array(sorted(bundle.iterdir())))


def changed(path: Path, content: bytes) -> bool:
    """Writes a content; returns whether it is another one."""
    before = path.read_bytes()
    path.write_bytes(content)
    return content != before


def flip_a_bit(random: np.random.Generator, bundle: Path, _other: Path) -> bool:
    path = some_file(random, bundle)
    content = bytearray(path.read_bytes())
    content[random.integers(len(content))] ^= 1 << int(random.integers(8))
    return changed(path, bytes(content))


def flip_many_bytes(random: np.random.Generator, bundle: Path, _other: Path) -> bool:
    path = some_file(random, bundle)
    content = bytearray(path.read_bytes())
    for place in random.integers(len(content), size=random.integers(1, 50)):
        content[place] = int(random.integers(256))
    return changed(path, bytes(content))


def truncate(random: np.random.Generator, bundle: Path, _other: Path) -> bool:
    path = some_file(random, bundle)
    content = path.read_bytes()
    return changed(path, content[: random.integers(len(content))])


def append(random: np.random.Generator, bundle: Path, _other: Path) -> bool:
    path = some_file(random, bundle)
    return changed(path, path.read_bytes() + random.bytes(int(random.integers(1, 100))))


def swap_two_pieces(random: np.random.Generator, bundle: Path, _other: Path) -> bool:
    path = some_file(random, bundle)
    content = path.read_bytes()
    a, b = sorted(random.integers(1, len(content), 2).tolist())
    return changed(path, content[b:] + content[a:b] + content[:a])


def remove_a_file(random: np.random.Generator, bundle: Path, _other: Path) -> bool:
    some_file(random, bundle).unlink()
    return True


def add_a_file(random: np.random.Generator, bundle: Path, _other: Path) -> bool:
    (bundle / f"extra-{random.integers(10**9)}.bin").write_bytes(random.bytes(10))
    return True


def take_a_file_of_another_version(random: np.random.Generator, bundle: Path, other: Path) -> bool:
    path = some_file(random, bundle)
    return changed(path, (other / path.name).read_bytes())


def take_all_of_another_version(_random: np.random.Generator, bundle: Path, other: Path) -> bool:
    shutil.rmtree(bundle)
    shutil.copytree(other, bundle)
    return True


def change_the_manifest(random: np.random.Generator, bundle: Path, _other: Path) -> bool:
    """A leaf of the manifest says something else, under the signature of before."""
    path = bundle / MANIFEST
    manifest = json.loads(path.read_bytes())
    node, keys = manifest, []
    while isinstance(node, dict) and node:
        keys.append(str(random.choice(sorted(node))))
        node = node[keys[-1]]
    parent = manifest
    for key in keys[:-1]:
        parent = parent[key]
    replacements = [0, 1, -1, 2**40, "", "x", None, [], {}, 1.5]
    parent[keys[-1]] = replacements[int(random.integers(len(replacements)))]
    return changed(path, json.dumps(manifest).encode()) and parent[keys[-1]] != node


def sign_with_another_key(_random: np.random.Generator, bundle: Path, _other: Path) -> bool:
    path = bundle / MANIFEST
    manifest = json.loads(path.read_bytes())
    manifest.pop("signature")
    path.write_bytes(json.dumps(sign_manifest(manifest, Ed25519PrivateKey.generate())).encode())
    return True


def guess_a_signature(random: np.random.Generator, bundle: Path, _other: Path) -> bool:
    path = bundle / MANIFEST
    manifest = json.loads(path.read_bytes())
    manifest["signature"] = base64.b64encode(random.bytes(64)).decode()
    path.write_bytes(json.dumps(manifest).encode())
    return True


MUTATIONS: list[Mutation] = [
    flip_a_bit,
    flip_many_bytes,
    truncate,
    append,
    swap_two_pieces,
    remove_a_file,
    add_a_file,
    take_a_file_of_another_version,
    take_all_of_another_version,
    change_the_manifest,
    sign_with_another_key,
    guess_a_signature,
]


def test_no_mutant_is_loaded(keys_dir: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    key = read_verifying_key(keys_dir)
    pairs = {("shoe-1", "hat"): 0.9}
    ranker = made_ranker(0, len(IDS))
    good = registry.version_path(
        "main", publish(tmp_path / "registry", keys_dir, IDS, VECTORS, pairs=pairs, ranker=ranker)
    )
    other = registry.version_path(
        "main", publish(tmp_path / "registry", keys_dir, IDS, VECTORS * 2, pairs=pairs, ranker=ranker)
    )
    kept = tmp_path / "kept"
    shutil.copytree(good, kept)
    assert load_bundle(good, key).version == good.name
    random = np.random.default_rng(11)
    refused: Counter[str] = Counter()
    attempts = 0
    while refused.total() < MUTANTS:
        attempts += 1
        mutate = MUTATIONS[attempts % len(MUTATIONS)]
        if mutate(random, good, other):
            with pytest.raises(DataLoss) as refusal:
                load_bundle(good, key)
            assert refusal.value.reason == "BUNDLE_DAMAGED"
            refused[mutate.__name__] += 1
        shutil.rmtree(good)
        shutil.copytree(kept, good)
    assert set(refused) == {mutate.__name__ for mutate in MUTATIONS}
    assert load_bundle(good, key).version == good.name
