"""Trainings that begin at the weights of a version."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from shopkeeper.trainer.v1 import training_run_pb2

from services.trainer.converters.config import config_from_proto, config_to_proto
from services.trainer.domain.hyper_parameters import resolve
from services.trainer.pipeline import warm_start
from services.trainer.pipeline.dataset import EventColumns, ItemAttributes, encode_attributes
from services.trainer.pipeline.pipeline import train_model
from services.trainer.pipeline.plan import Plan, TrainedModel
from services.trainer.pipeline.warm_start import (
    InitialWeights,
    begin_at,
    lineage_of,
    read_weights,
    weights_to_bytes,
)
from shared.errors import FailedPrecondition, InvalidInput
from tests.trainer.conftest import columns_of, walk

LATER = 10**12
SIZE = resolve("tiny", {"max_epochs": 24, "negatives": 8})


def model_of(items: int, attributes: ItemAttributes, seed: int, **changes: int):
    from services.trainer.pipeline.sequence_model import SequenceModel

    return SequenceModel(items, attributes, resolve("tiny", {"negatives": 8, **changes}), seed)


def weights_of(directory: Path, model, attributes: ItemAttributes, item_ids: list[str]) -> InitialWeights:
    (directory / warm_start.FILE).write_bytes(weights_to_bytes(model, attributes))
    manifest = {
        "created_at": "1970-01-03T00:00:00+00:00",
        "data": {"last_event_at": datetime(1970, 1, 2, tzinfo=UTC).isoformat()},
    }
    return read_weights(directory, "v1", item_ids, manifest)


def test_rows_go_to_their_items_and_attributes_whatever_their_places_and_new_ones_begin_at_the_mean(
    tmp_path: Path,
) -> None:
    old_ids, new_ids = ["a", "b", "c", "d"], ["new", "d", "b", "a"]
    old_attributes = encode_attributes(old_ids, {"a": ["x", "y"], "b": ["x", "y"], "c": ["x"], "d": []})
    new_attributes = encode_attributes(new_ids, {"new": ["y", "z"], "d": ["z"], "b": ["y"], "a": ["x"]})
    assert list(old_attributes.names) == ["x", "y"]
    assert list(new_attributes.names) == ["y", "z"]
    old, new = model_of(4, old_attributes, 1), model_of(4, new_attributes, 2)
    initial = weights_of(tmp_path, old, old_attributes, old_ids)

    assert begin_at(initial, new, new_ids, new_attributes) == 3

    identity, attribute, *dense = new.weights()
    old_identity, old_attribute, *old_dense = old.weights()
    np.testing.assert_array_equal(identity[1:], old_identity[[3, 1, 0]])
    np.testing.assert_allclose(identity[0], old_identity.mean(axis=0), atol=1e-7)
    np.testing.assert_array_equal(attribute[1], old_attribute[2])
    np.testing.assert_allclose(attribute[2], old_attribute[1:].mean(axis=0), atol=1e-7)
    for ours, theirs in zip(dense, old_dense, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # What is averaged begins there too, else the first validation would see the random weights.
    with new.averaged():
        np.testing.assert_allclose(new.weights()[0], identity, atol=1e-6)


def test_weights_of_another_size_are_refused_and_so_is_a_version_without(tmp_path: Path) -> None:
    attributes = encode_attributes(["a", "b"], {})
    initial = weights_of(tmp_path, model_of(2, attributes, 1), attributes, ["a", "b"])
    with pytest.raises(FailedPrecondition, match="another size") as caught:
        begin_at(initial, model_of(2, attributes, 1, dimension=48), ["a", "b"], attributes)
    assert caught.value.reason == "INITIAL_VERSION_UNFIT"
    (tmp_path / warm_start.FILE).unlink()
    with pytest.raises(FailedPrecondition, match="carries no weights"):
        read_weights(tmp_path, "v1", ["a", "b"], {"data": {"last_event_at": "1970-01-02T00:00:00+00:00"}})


def days(shift: int = 0) -> EventColumns:
    """A day of events; the first `shift` of each person's are of the day before."""
    events = columns_of(walk(users=150, items=30, shortest=12, longest=16))
    place_E = events.time_E // 60_000_000
    return replace(events, time_E=events.time_E + np.where(place_E >= shift, LATER, 0))


def train(events: EventColumns, initial: InitialWeights | None = None) -> TrainedModel:
    return train_model(
        events, {}, SIZE, Plan(refit=False, resamples=100), model_name="main", seed=1, initial=initial,
        report=lambda *_, **__: None, clock=lambda: 0.0,
    )  # fmt: skip


def test_a_refresh_takes_fewer_passes_is_as_good_and_is_measured_on_newer_events_alone(
    tmp_path: Path,
) -> None:
    everything = days(shift=9)
    old_E = everything.time_E < LATER
    yesterday = replace(
        everything,
        **{name: getattr(everything, name)[old_E] for name in ("user_E", "item_E", "kind_E", "time_E", "order_E")},
    )  # fmt: skip
    first = train(yesterday)
    (tmp_path / warm_start.FILE).write_bytes(first.attachments[warm_start.FILE])
    published = {
        **first.manifest_fields,
        "created_at": "1970-01-03T00:00:00+00:00",
        "requested_at": "1970-01-02T00:00:00+00:00",
    }
    initial = read_weights(tmp_path, "v1", list(first.vocabulary), published)

    refreshed, anew = train(everything, initial), train(everything)

    assert refreshed.manifest_fields["hyper_parameters"]["initial_version"] == "v1"
    assert refreshed.manifest_fields["hyper_parameters"]["max_epochs"] == 6
    assert "initial_version" not in anew.manifest_fields["hyper_parameters"]
    # Receipts of erasure find the ancestor here when it is gone.
    (ancestor,) = refreshed.manifest_fields["lineage"]
    assert (ancestor["version"], ancestor["created_at"]) == ("v1", published["created_at"])
    assert ancestor["requested_at"] == published["requested_at"]
    assert lineage_of("v2", {**published, **refreshed.manifest_fields})[1:] == [ancestor]
    assert "lineage" not in anew.manifest_fields
    quality = [m.report.ladder[0].metrics["ndcg@10"].value for m in (refreshed, anew)]
    assert quality[0] > 0.9 * quality[1] > 0.1
    time_B = refreshed.histories.time_E[
        refreshed.histories.start_U1[refreshed.tested.user_B] + refreshed.tested.prefix_B
    ]
    assert (time_B > initial.last_event_microseconds).all()
    # Nothing came since: there is no event left that is a fair question.
    with pytest.raises(FailedPrecondition, match="newer than what initial_version") as caught:
        train(yesterday, initial)
    assert caught.value.reason == "TOO_LITTLE_DATA"


def test_a_run_may_ask_for_a_version_to_begin_with_but_not_a_private_one() -> None:
    message = training_run_pb2.TrainingConfig(initial_version="production")
    config = config_from_proto(message)
    assert config.initial_version == "production"
    assert config_to_proto(config).initial_version == "production"
    for name in ("../production", "Production", "a\0"):
        with pytest.raises(InvalidInput, match=r"config.initial_version must be a version, or an alias"):
            config_from_proto(training_run_pb2.TrainingConfig(initial_version=name))
    message.differential_privacy.epsilon = 1
    with pytest.raises(InvalidInput, match="initial_version"):
        config_from_proto(message)
