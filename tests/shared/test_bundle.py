"""A version loads whole and true, or not at all."""

from __future__ import annotations

import base64
import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.bundle import (
    Companion,
    CooccurrenceMatrix,
    History,
    LiteRtEncoder,
    Registry,
    ScoringParameters,
    blended_scores,
    cooccurrence_contributions,
    cooccurrence_neighbours,
    cooccurrence_scores,
    encoder_inputs,
    history_from_events,
    load_bundle,
    log_partition,
    score_candidates,
    write_bundle,
)
from shared.bundle.arrays import encode_arrays, map_arrays, release_pages
from shared.bundle.manifest import canonical_json, sha256_of, sign_manifest
from shared.bundle.scoring import cooccurrence_scores_of_batch, naive_blended_scores
from shared.bundle.sum_encoder import build_sum_encoder
from shared.errors import Aborted, DataLoss, FailedPrecondition, InvalidInput, NotFound

I, D, L = 6, 4, 5  # noqa: E741 - the paper's letters
KEY = Ed25519PrivateKey.generate()


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        "item_vectors": generator.normal(size=(I, D)).astype(np.float32),
        "item_bias": generator.normal(size=I).astype(np.float32),
        "popularity": generator.random(I).astype(np.float32),
        "cooccurrence_indptr": np.array([0, 2, 2, 3, 5, 6, 7]),
        "cooccurrence_indices": np.array([1, 2, 0, 4, 5, 1, 3], np.int32),
        "cooccurrence_weights": generator.random(7).astype(np.float32),
    }


def all_arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(1)
    return {
        **arrays(),
        "backward_indptr": np.array([0, 1, 3, 3, 4, 5, 5]),
        "backward_indices": np.array([0, 2, 5, 3, 1], np.int32),
        "backward_weights": generator.random(5).astype(np.float32),
        "attribute_queries": generator.normal(size=(I, 2)).astype(np.float32),
        "attribute_keys": generator.normal(size=(I, 2)).astype(np.float32),
    }


def publish(registry: Registry, **changes: object) -> str:
    fields: dict[str, object] = {
        "arrays": arrays(),
        "vocabulary": [f"Artikel-{i}-ä" for i in range(I)],
        "encoder_bytes": build_sum_encoder(L, D),
        "manifest_fields": {
            "encoder": {"max_history": L, "dimension": D},
            "scoring": ScoringParameters(0.5).to_json(),
        },
        "attachments": {"card.md": b"# card"},
        "signing_key": KEY,
        **changes,
    }
    return write_bundle(registry, "main", **fields)  # type: ignore[arg-type]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_what_was_written_is_what_loads(registry: Registry) -> None:
    version = publish(registry)
    bundle = load_bundle(registry.version_path("main", version), KEY.public_key())
    assert list(bundle.item_ids) == [f"Artikel-{i}-ä" for i in range(I)]
    assert bundle.index_of("Artikel-3-ä") == 3
    assert bundle.index_of("nobody's") is None
    np.testing.assert_array_equal(bundle.item_vectors, arrays()["item_vectors"])
    assert bundle.scoring == ScoringParameters(0.5)
    inputs = encoder_inputs(History(np.array([0, 2]), np.array([3, 6], np.int32)), bundle.item_vectors, L)
    np.testing.assert_allclose(
        bundle.encoder.encode(*inputs), bundle.item_vectors[0] + bundle.item_vectors[2], rtol=1e-6
    )


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the kernel does not tell")
def test_memory_that_was_read_to_verify_is_given_back_and_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    written = np.arange(1 << 20, dtype=np.float32)
    path.write_bytes(encode_arrays({"first": written, "second": written}))

    def resident_kb() -> int:
        _, _, mapping = Path("/proc/self/smaps").read_text().partition(str(path))
        return int(mapping.partition("\nRss:")[2].split()[0])

    mapped = map_arrays(path)
    assert all(np.isfinite(array).all() for array in mapped.values())
    assert resident_kb() >= 8_192
    release_pages(mapped["second"])
    assert resident_kb() < 1_000
    assert np.array_equal(mapped["first"], written)
    release_pages(written)


def test_no_array_of_a_loaded_version_can_be_changed(registry: Registry) -> None:
    bundle = load_bundle(registry.version_path("main", publish(registry)), KEY.public_key())
    with pytest.raises(ValueError, match="read-only"):
        bundle.item_vectors[0, 0] = 1


@pytest.mark.parametrize(
    "name", ["manifest.json", "weights.safetensors", "vocabulary.safetensors", "encoder.tflite", "card.md"]
)
def test_a_changed_byte_anywhere_in_any_file_is_refused(registry: Registry, name: str) -> None:
    path = registry.version_path("main", publish(registry)) / name
    content = path.read_bytes()
    places = np.unique(np.linspace(0, len(content) - 1, 25).astype(int))
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x20]) + content[place + 1 :])
        with pytest.raises(DataLoss) as refused:
            load_bundle(path.parent, KEY.public_key())
        assert refused.value.reason == "BUNDLE_DAMAGED"
    for changed in (content[:-1], content + b"\n", b""):
        path.write_bytes(changed)
        with pytest.raises(DataLoss):
            load_bundle(path.parent, KEY.public_key())
    path.write_bytes(content)
    load_bundle(path.parent, KEY.public_key())


def test_a_missing_or_an_additional_file_is_refused(registry: Registry) -> None:
    path = registry.version_path("main", publish(registry))
    (path / "more.txt").write_text("")
    with pytest.raises(DataLoss, match="does not list it"):
        load_bundle(path, KEY.public_key())
    (path / "more.txt").unlink()
    (path / "card.md").unlink()
    with pytest.raises(DataLoss, match=r"card\.md"):
        load_bundle(path, KEY.public_key())


def test_another_signer_and_another_name_are_refused(registry: Registry) -> None:
    version = publish(registry)
    path = registry.version_path("main", version)
    with pytest.raises(DataLoss, match="signature"):
        load_bundle(path, Ed25519PrivateKey.generate().public_key())
    path.rename(path.with_name("20990101t000000z-000000"))
    with pytest.raises(DataLoss, match="belongs to model main"):
        load_bundle(path.with_name("20990101t000000z-000000"), KEY.public_key())


def resign(path: Path, **changes: object) -> None:
    """Makes a manifest that is signed, but wrong."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest.update(changes)
    for name in manifest["files"]:
        digest, size = sha256_of(path / name)
        manifest["files"][name] = {"sha256": digest, "bytes": size}
    (path / "manifest.json").write_bytes(canonical_json(sign_manifest(manifest, KEY)))


def test_a_signed_manifest_in_another_form_or_schema_is_refused(registry: Registry) -> None:
    path = registry.version_path("main", publish(registry))
    resign(path)
    load_bundle(path, KEY.public_key())
    resign(path, schema_version=3)
    with pytest.raises(DataLoss, match="its schema is 3, not 1 or 2"):
        load_bundle(path, KEY.public_key())
    resign(path, schema_version=2, scoring={"lambda": -1, "scale": 1, "query_decay": 1, "window": 1})
    with pytest.raises(DataLoss, match="scoring"):
        load_bundle(path, KEY.public_key())
    resign(path, scoring=ScoringParameters(0.5).to_json())
    manifest = json.loads((path / "manifest.json").read_bytes())
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1))
    with pytest.raises(DataLoss, match="canonical"):
        load_bundle(path, KEY.public_key())
    manifest["signature"] = base64.b64encode(b"x" * 64).decode()
    (path / "manifest.json").write_bytes(canonical_json(manifest))
    with pytest.raises(DataLoss, match="signature"):
        load_bundle(path, KEY.public_key())


def test_a_version_of_the_first_schema_loads_and_scores_as_it_did(registry: Registry) -> None:
    path = registry.version_path("main", publish(registry))
    first = {"lambda": 0.5, "scale": 30.0, "query_decay": 0.6065, "window": 50}
    resign(path, schema_version=1, scoring=first)
    bundle = load_bundle(path, KEY.public_key())
    history_H = np.array([3, 0, 2])
    c_I = cooccurrence_scores(MATRIX, history_H, bundle.scoring)
    np.testing.assert_allclose(bundle.companion.added(history_H), 0.5 * np.log1p(30 * c_I), rtol=1e-6)


def test_backward_counts_and_attribute_factors_come_back_as_they_were_written(registry: Registry) -> None:
    scoring = ScoringParameters(0.5, backward=-0.2, repeat=0.3, sequence=0.8)
    fields = {"encoder": {"max_history": L, "dimension": D}, "scoring": scoring.to_json()}
    version = publish(registry, arrays=all_arrays(), manifest_fields=fields)
    bundle = load_bundle(registry.version_path("main", version), KEY.public_key())
    assert bundle.scoring == scoring
    for name, array in bundle.companion.to_arrays().items():
        np.testing.assert_array_equal(array, all_arrays()[name])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"backward_indptr": np.array([0, 1, 3, 3, 4, 5, 5])}, "backward_indices"),
        ({"attribute_queries": np.zeros((I, 3), np.float32)}, "attribute_keys"),
        ({"item_vectors": np.zeros((I, D + 1), np.float32)}, "item_vectors"),
        ({"item_vectors": np.zeros((I, D), np.int32)}, "item_vectors"),
        ({"item_vectors": np.full((I, D), np.nan, np.float32)}, "not finite"),
        ({"item_bias": np.zeros(I + 1, np.float32)}, "item_bias"),
        ({"popularity": np.full(I, -1, np.float32)}, "negative"),
        ({"cooccurrence_indptr": np.array([0, 3, 2, 3, 5, 6, 7])}, "tile"),
        ({"cooccurrence_indices": np.array([1, 2, 0, 4, I, 1, 3], np.int32)}, "outside"),
        ({"cooccurrence_weights": np.zeros(6, np.float32)}, "cooccurrence_weights"),
        ({"last_seen": np.zeros(I - 1, np.int64)}, "last_seen"),
    ],
)
def test_arrays_that_do_not_fit_together_are_never_published(
    registry: Registry, change: dict[str, np.ndarray], why: str
) -> None:
    with pytest.raises(DataLoss, match=why):
        publish(registry, arrays={**arrays(), **change})
    assert list(registry.root.rglob("*.*")) == []


def test_a_vocabulary_that_names_an_item_twice_is_refused(registry: Registry) -> None:
    with pytest.raises(DataLoss, match="twice"):
        publish(registry, vocabulary=["a"] * I)


def test_a_custom_operator_is_refused_at_load() -> None:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(build_sum_encoder(L, D), 0))
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode = (
        schema.BuiltinOperator.CUSTOM,
        schema.BuiltinOperator.CUSTOM,
    )
    code.customCode = "FlexReadFile"
    model.operatorCodes.append(code)
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    with pytest.raises(ValueError, match="FlexReadFile"):
        LiteRtEncoder(bytes(builder.Output()), L, D)


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\0\0\0\0TFL3", b"\xff" * 64])
def test_what_is_no_model_is_refused_and_does_not_crash(content: bytes) -> None:
    with pytest.raises(ValueError, match="LiteRT"):
        LiteRtEncoder(content, L, D)


def test_an_encoder_of_other_shapes_is_refused(registry: Registry) -> None:
    with pytest.raises(DataLoss, match="item_vectors"):
        publish(registry, encoder_bytes=build_sum_encoder(L + 1, D))


def test_threads_that_encode_at_once_do_not_mix_their_histories() -> None:
    encoder = LiteRtEncoder(build_sum_encoder(L, D), L, D)
    barrier = threading.Barrier(4)

    def encode(number: int) -> bool:
        vectors_LD = np.full((L, D), number, np.float32)
        barrier.wait()
        return all(
            (encoder.encode(vectors_LD, np.zeros(L, np.int32), np.ones(L, np.float32)) == L * number).all()
            for _ in range(300)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(encode, range(4)))


def test_a_full_disk_at_any_write_leaves_the_registry_as_it_was(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing = publish(registry)
    import os

    fsync, calls = os.fsync, 0

    def count(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", count)
    publish(registry)
    writes = calls
    standing_versions = registry.list_versions("main")
    assert standing in standing_versions
    # The last sync follows the rename: by then the version is there.
    for failing in range(1, writes):
        calls = 0

        def fail(descriptor: int, failing: int = failing) -> None:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="No space"):
            publish(registry)
        assert registry.list_versions("main") == standing_versions
        assert not list((registry.root / "main").glob(".staging-*"))


def test_who_loses_the_lease_just_before_publishing_publishes_nothing(registry: Registry) -> None:
    def lost() -> None:
        raise Aborted("LEASE_LOST", "somebody else publishes")

    with pytest.raises(Aborted):
        publish(registry, before_publish=lost)
    assert registry.versions() == []


def test_staging_is_no_version_and_can_be_removed(registry: Registry) -> None:
    version = publish(registry)
    abandoned = registry.root / "main" / ".staging-20260101t000000z-abcdef"
    abandoned.mkdir()
    assert registry.versions() == [("main", version)]
    assert registry.remove_abandoned_staging("main") == [abandoned.name]
    assert not abandoned.exists()


def test_an_alias_remembers_and_rolls_back_further_each_time(registry: Registry) -> None:
    first, second, third = (publish(registry) for _ in range(3))
    for version in (first, second, third):
        registry.set_alias("main", "production", version, reason="PROMOTED")
    assert registry.roll_back_alias("main", "production").version == second
    assert registry.roll_back_alias("main", "production", comment="again").version == first
    state = registry.alias("main", "production")
    assert state is not None
    assert [change.reason for change in state.history[:2]] == ["ROLLED_BACK", "ROLLED_BACK"]
    assert state.history[0].comment == "again"
    with pytest.raises(FailedPrecondition, match="no version before"):
        registry.roll_back_alias("main", "production")


def test_an_alias_is_changed_once_by_many_who_saw_the_same_state(registry: Registry) -> None:
    start = publish(registry)
    registry.set_alias("main", "production", start, reason="PROMOTED")
    versions = [publish(registry) for _ in range(6)]

    def promote(version: str) -> bool:
        try:
            registry.set_alias("main", "production", version, reason="PROMOTED", expected_current=start)
        except Aborted:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(promote, versions)) == 1


def test_an_alias_needs_a_version_and_no_name_leaves_the_registry(registry: Registry) -> None:
    publish(registry)
    with pytest.raises(NotFound):
        registry.set_alias("main", "production", "20990101t000000z-000000", reason="PROMOTED")
    for name in ("../other", "", "A", "x" * 64, ".", "a/b"):
        with pytest.raises(InvalidInput):
            registry.version_path("main", name)
    assert registry.alias("main", "production") is None
    assert registry.list_versions("other") == []


# ---- history and scoring

MATRIX = CooccurrenceMatrix(
    arrays()["cooccurrence_indptr"], arrays()["cooccurrence_indices"], arrays()["cooccurrence_weights"]
)


def test_a_history_skips_the_unknown_and_the_indifferent_and_ends_each_run_as_it_ended() -> None:
    index_of = {"a": 0, "b": 1}.get
    history = history_from_events(["a", "a", "gone", "a", "b", "a", "a"], [3, 4, 3, 6, 1, 3, 5], index_of)
    # One run of a, which ended with a view: b was only searched for, and removing from the cart is no interest.
    assert history.indices_H.tolist() == [0]
    assert history.kinds_H.tolist() == [3]
    history = history_from_events(["a", "b", "a"], [3, 6, 4], index_of)
    assert history.indices_H.tolist() == [0, 1, 0]


def test_inputs_are_padded_on_the_left_and_hold_the_newest_events() -> None:
    vectors_ID = arrays()["item_vectors"]
    history = History(np.array([0, 1, 2, 3, 4, 5, 0]), np.arange(3, 10, dtype=np.int32))
    vectors_LD, kinds_L, mask_L = encoder_inputs(history, vectors_ID, 5)
    np.testing.assert_array_equal(vectors_LD, vectors_ID[[2, 3, 4, 5, 0]])
    assert kinds_L.tolist() == [5, 6, 7, 8, 9]
    vectors_LD, kinds_L, mask_L = encoder_inputs(
        History(np.array([4]), np.array([6], np.int32)), vectors_ID, 3
    )
    assert mask_L.tolist() == [0, 0, 1]
    assert kinds_L.tolist() == [0, 0, 6]
    assert (vectors_LD[:2] == 0).all()


HISTORIES = [np.array(h, np.int64) for h in ([0], [3, 0, 2], [5, 4, 3, 2, 1, 0, 3, 3], [1])]


SCORINGS = [
    ScoringParameters(0.0, window=4),
    ScoringParameters(0.7, window=4),
    ScoringParameters(0.7, scale=5.0, window=4, sequence=0.6, backward=-0.4, repeat=0.3),
]


@pytest.mark.parametrize("history_H", HISTORIES)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("weights", [arrays(), all_arrays()])
def test_scores_equal_the_formula_in_loops(
    history_H: np.ndarray, scoring: ScoringParameters, weights: dict[str, np.ndarray]
) -> None:
    companion = Companion.from_arrays(weights, scoring)
    query_D = np.random.default_rng(9).normal(size=D).astype(np.float32)
    expected_I = naive_blended_scores(
        weights["item_vectors"], weights["item_bias"], companion, query_D, history_H
    )
    logits_I = scoring.sequence * (weights["item_vectors"] @ query_D) + weights["item_bias"]
    found_I = blended_scores(logits_I, companion.added(history_H))
    np.testing.assert_allclose(found_I, expected_I, rtol=1e-5, atol=1e-6)
    candidates_C = np.array([5, 1, 1, 0])
    of_candidates_C = score_candidates(
        weights["item_vectors"],
        weights["item_bias"],
        companion,
        query_D,
        history_H,
        candidates_C,
        float(log_partition(logits_I)),
    )
    np.testing.assert_allclose(of_candidates_C, expected_I[candidates_C], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("history_H", [*HISTORIES, np.array([], np.int64)])
def test_what_a_history_item_carries_is_what_the_counts_lose_without_it(history_H: np.ndarray) -> None:
    scoring = SCORINGS[2]
    companion = Companion.from_arrays(all_arrays(), scoring)
    lost_CH = companion.losses(history_H, np.arange(I))
    assert lost_CH.shape == (I, len(history_H))

    def counted(weight_H: np.ndarray, matrix_II: np.ndarray) -> np.ndarray:
        return np.log1p(scoring.scale * (weight_H @ matrix_II[history_H]))

    age_H = np.arange(len(history_H))[::-1]
    weight_H = np.where(age_H < scoring.window, scoring.query_decay**age_H, 0)
    assert companion.backward is not None
    for place in range(len(history_H)):
        without_H = weight_H * (np.arange(len(history_H)) != place)
        expected_I = sum(
            weight * (counted(weight_H, matrix) - counted(without_H, matrix))
            for weight, matrix in (
                (scoring.lambda_, companion.forward.to_dense()),
                (scoring.backward, companion.backward.to_dense()),
                (scoring.repeat, np.eye(I)),
            )
        )
        np.testing.assert_allclose(lost_CH[:, place], expected_I, atol=1e-6)


@pytest.mark.parametrize("history_H", [*HISTORIES, np.array([], np.int64)])
def test_contributions_of_history_items_add_up_to_the_cooccurrence(history_H: np.ndarray) -> None:
    scoring = ScoringParameters(1.0, window=4)
    candidates_C = np.array([1, 4, 1, 0, 2, 3, 5])
    contributions_CH = cooccurrence_contributions(MATRIX, history_H, candidates_C, scoring)
    assert contributions_CH.shape == (7, len(history_H))
    c_I = cooccurrence_scores(MATRIX, history_H, scoring)
    np.testing.assert_allclose(contributions_CH.sum(axis=1), c_I[candidates_C], rtol=1e-5)
    assert (contributions_CH[:, : max(0, len(history_H) - 4)] == 0).all()
    items_M, c_M = cooccurrence_neighbours(MATRIX, history_H, scoring)
    np.testing.assert_allclose(c_I[items_M], c_M, rtol=1e-6)
    assert (np.delete(c_I, items_M) == 0).all()


def test_a_batch_scores_as_its_members_do() -> None:
    scoring = ScoringParameters(1.0, window=4)
    batch_BI = cooccurrence_scores_of_batch(MATRIX, HISTORIES, scoring)
    for row, history_H in enumerate(HISTORIES):
        np.testing.assert_allclose(batch_BI[row], cooccurrence_scores(MATRIX, history_H, scoring), rtol=1e-6)
