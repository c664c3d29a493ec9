"""What the model may and may not see."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from services.trainer.domain.hyper_parameters import resolve
from services.trainer.pipeline.dataset import (
    Cleaning,
    EventColumns,
    ItemAttributes,
    clean,
    encode_attributes,
    hold_out,
)
from services.trainer.pipeline.packing import next_items, pack_for_training, pack_pieces, place_pieces
from shared.bundle import history_from_events
from tests.trainer.conftest import columns_of, walk

NO_ATTRIBUTES = ItemAttributes(np.zeros((40, 0), np.int32), 0)


@pytest.fixture(scope="module")
def model():
    from services.trainer.pipeline.sequence_model import SequenceModel

    return SequenceModel(40, NO_ATTRIBUTES, resolve("tiny", {}), seed=3)


def queries(model, items, kinds, segments):
    import tensorflow as tf

    rows, length = model.size.rows_per_step, model.size.max_history
    padded = np.zeros((3, rows, length), np.int32)
    for place, values in enumerate((items, kinds, segments)):
        padded[place, 0, : len(values)] = values
    vectors_BTD = tf.constant(model.item_vectors()[padded[0]])
    return model._encode_rows(vectors_BTD, *(tf.constant(part) for part in padded[1:])).numpy()[0]


def test_within_averages_everything_that_is_read_is_averaged_and_afterwards_trained_again() -> None:
    from services.trainer.pipeline.dataset import Cleaning, clean, leave_one_out
    from services.trainer.pipeline.sequence_model import SequenceModel

    histories = clean(columns_of(walk(users=30, items=20)), Cleaning())
    attributes = encode_attributes(
        histories.item_ids, {name: ["all", name[-1]] for name in histories.item_ids}
    )
    model = SequenceModel(histories.item_count, attributes, resolve("tiny", {}), seed=1)
    generator = np.random.default_rng(0)
    asked = leave_one_out(histories, True).test
    averages = [generator.normal(size=w.shape).astype(np.float32) for w in model.weights()]
    model.set_weights(averages)
    model.start_averages()
    expected = model.item_vectors(), model.encode(histories, asked)
    trained = [0.5 * weight for weight in averages]
    model.set_weights(trained)
    with model.averaged():
        for found, value in zip(model.weights(), averages, strict=True):
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(model.item_vectors(), expected[0], rtol=1e-6)
        np.testing.assert_allclose(model.encode(histories, asked), expected[1], rtol=1e-4, atol=1e-5)
    for found, value in zip(model.weights(), trained, strict=True):
        np.testing.assert_array_equal(found, value)
    np.testing.assert_allclose(model.item_vectors(), 0.5 * expected[0], rtol=1e-5)


def test_what_comes_later_changes_nothing_that_came_before(model) -> None:
    kinds, segments = [3] * 6, [1] * 6
    before = queries(model, [1, 2, 3, 4, 5, 6], kinds, segments)
    after = queries(model, [1, 2, 3, 9, 5, 6], kinds, segments)
    np.testing.assert_array_equal(before[:3], after[:3])
    assert np.abs(before[3:6] - after[3:6]).max() > 1e-3


def test_people_in_one_row_never_see_each_other(model) -> None:
    together = queries(model, [1, 2, 3, 7, 8], [3] * 5, [1, 1, 1, 2, 2])
    other_neighbour = queries(model, [5, 6, 9, 7, 8], [3] * 5, [1, 1, 1, 2, 2])
    alone = queries(model, [7, 8], [3] * 2, [1, 1])
    np.testing.assert_array_equal(together[3:5], other_neighbour[3:5])
    np.testing.assert_allclose(together[3:5], alone[:2], atol=1e-6)


def test_the_kind_of_an_event_matters(model) -> None:
    viewed = queries(model, [1, 2], [3, 3], [1, 1])
    bought = queries(model, [1, 2], [3, 6], [1, 1])
    assert np.abs(viewed[1] - bought[1]).max() > 1e-3


def test_the_served_encoder_says_what_training_says_also_for_short_and_for_long_histories(model) -> None:
    from services.trainer.pipeline.export import convert, measure_parity

    histories = clean(columns_of(walk(users=30, items=40, longest=60)), Cleaning())
    flatbuffer = convert(model.encoder)
    parity, _ = measure_parity(model, flatbuffer, histories, hold_out(histories, 1, False))
    assert parity <= 1e-5


def test_an_encoder_that_answers_no_number_is_no_parity(model) -> None:
    from services.trainer.pipeline.export import convert, measure_parity

    histories = clean(columns_of(walk(users=30, items=40)), Cleaning())
    flatbuffer = convert(model.encoder)
    weights = model.weights()
    model.set_weights([np.full_like(weight, np.nan) for weight in weights])
    parity, _ = measure_parity(model, flatbuffer, histories, hold_out(histories, 1, False))
    model.set_weights(weights)
    assert parity == np.inf


def test_a_token_learns_the_next_items_of_its_person_and_of_nobody_else() -> None:
    histories = clean(columns_of([[0, 1, 2, 3], [4, 5]]), Cleaning())
    assert next_items(histories, 3).tolist() == [
        [1, 2, 3], [2, 3, -1], [3, -1, -1], [-1, -1, -1],
        [5, -1, -1], [-1, -1, -1],
    ]  # fmt: skip


def losses_by_hand(query_MD, vector_ID, answer_MK, other_N, log_q: float) -> np.ndarray:
    """The formula of the module in loops."""
    found = np.zeros(answer_MK.shape)
    for m, answers in enumerate(answer_MK.tolist()):
        negatives = [
            np.exp(np.float64(query_MD[m] @ vector_ID[n]) + log_q) for n in other_N if n not in answers
        ]
        for k, answer in enumerate(answers):
            positive = np.exp(np.float64(query_MD[m] @ vector_ID[answer]))
            found[m, k] = np.log(positive + sum(negatives)) - np.log(positive)
    return found


@pytest.mark.parametrize(("negatives", "full"), [(4, False), (64, True)])
def test_the_loss_is_that_of_the_formula_with_own_targets_left_out(negatives: int, full: bool) -> None:
    import tensorflow as tf

    from services.trainer.pipeline.sequence_model import SequenceModel

    model = SequenceModel(
        10, ItemAttributes(np.zeros((10, 0), np.int32), 0), resolve("tiny", {"negatives": negatives}), 1
    )
    assert model.full_softmax == full
    generator = np.random.default_rng(0)
    query_MD = generator.normal(size=(4, 16)).astype(np.float32)
    vector_ID = generator.normal(size=(10, 16)).astype(np.float32)
    answer_MK = np.array([[2, 5, 7], [2, 2, 2], [0, 1, 9], [9, 8, 3]], np.int32)
    other_N = np.arange(10) if full else np.array([2, 4, 4, 9])
    found = model._losses(
        tf.constant(query_MD), tf.constant(vector_ID), tf.constant(answer_MK), tf.constant(other_N, tf.int32)
    )
    # Each of four uniform draws stands for 9 / 4 items.
    log_q = 0.0 if full else np.log(9 / 4)
    np.testing.assert_allclose(
        found, losses_by_hand(query_MD, vector_ID, answer_MK, other_N, log_q), rtol=1e-4
    )


def test_averaged_weights_follow_the_trained_ones_and_leave_them_as_they_were() -> None:
    from services.trainer.pipeline.sequence_model import SequenceModel

    model = SequenceModel(10, ItemAttributes(np.zeros((10, 0), np.int32), 0), resolve("tiny", {}), seed=1)
    first = model.id_table.numpy().copy()
    model.id_table.assign(first + 1.0)
    model.average(passes=1)
    # After one pass a quarter is remembered.
    with model.averaged():
        np.testing.assert_allclose(model.weights()[0], first + 0.75, rtol=1e-5)
    np.testing.assert_array_equal(model.weights()[0], first + np.float32(1.0))


def test_sparse_adam_moves_only_rows_that_were_read_and_as_adam_does() -> None:
    import tensorflow as tf

    from services.trainer.pipeline.sequence_model import SequenceModel

    size = resolve("tiny", {"warmup_steps": 0, "learning_rate": 0.01})
    model = SequenceModel(10, ItemAttributes(np.zeros((10, 0), np.int32), 0), size, seed=1)
    before = model.id_table.numpy().copy()
    gradient = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    model._apply(
        tf.constant([3, 7]),
        tf.constant([], tf.int32),
        [tf.constant(gradient), None, *[None] * len(model.dense)],
    )
    after = model.id_table.numpy()
    untouched = [i for i in range(10) if i not in (3, 7)]
    np.testing.assert_array_equal(before[untouched], after[untouched])
    # The first step of Adam is the learning rate in the gradient's direction.
    np.testing.assert_allclose(after[[3, 7]] - before[[3, 7]], -0.01 * np.sign(gradient), rtol=1e-3)


def test_packing_loses_no_event_and_fills_its_rows() -> None:
    histories = clean(columns_of(walk(users=400, items=50, longest=90)), Cleaning())
    packed = pack_for_training(histories, 32, np.random.default_rng(0))
    expected = []
    for user in range(histories.user_count):
        items = histories.item_E[histories.start_U1[user] : histories.start_U1[user + 1]].tolist()
        expected += list(itertools.pairwise(items))
    known = packed.segment_RT > 0
    found = list(zip(packed.item_RT[known].tolist(), packed.target_RTK[known][:, 0].tolist(), strict=True))
    assert sorted(found) == sorted(expected)
    assert packed.filled_share > 0.95


def test_no_two_pieces_share_a_place() -> None:
    length_S = np.random.default_rng(1).integers(1, 33, 500)
    row_S, offset_S, rows = place_pieces(length_S, 32, np.random.default_rng(2))
    taken = np.zeros((rows, 32), int)
    for row, offset, length in zip(row_S, offset_S, length_S, strict=True):
        taken[row, offset : offset + length] += 1
    assert taken.max() == 1
    assert length_S.sum() / taken.size > 0.97


def test_segments_are_distinct_within_a_row_and_last_tokens_are_found() -> None:
    item_E = np.arange(1, 10, dtype=np.int32)
    packed = pack_pieces(
        np.array([0, 3, 5]), np.array([3, 2, 4]), item_E, item_E, np.full((9, 1), -1, np.int32), 8
    )
    assert packed.item_RT.ravel()[packed.last_S].tolist() == [3, 5, 9]
    for row in packed.segment_RT:
        pieces = [segment for segment in np.unique(row) if segment]
        assert pieces == list(range(1, len(pieces) + 1))


def test_cleaning_without_a_loop_equals_the_history_that_is_served() -> None:
    generator = np.random.default_rng(5)
    count = 2_000
    events = EventColumns(
        user_E=generator.integers(0, 50, count),
        item_E=generator.integers(0, 6, count).astype(np.int32),
        kind_E=generator.choice([1, 3, 4, 5, 6, 7, 13], count).astype(np.int32),
        time_E=generator.permutation(count),
        order_E=np.zeros(count, np.int64),
        item_ids=[f"i{n}" for n in range(6)],
    )
    histories = clean(events, Cleaning(min_user_events=1, max_user_events=10_000))
    index_of = {item_id: index for index, item_id in enumerate(histories.item_ids)}
    for place, user in enumerate(histories.user_U.tolist()):
        rows = np.flatnonzero(events.user_E == user)
        rows = rows[np.argsort(events.time_E[rows])]
        served = history_from_events(
            [events.item_ids[i] for i in events.item_E[rows]], events.kind_E[rows].tolist(), index_of.get
        )
        span = slice(histories.start_U1[place], histories.start_U1[place + 1])
        np.testing.assert_array_equal(served.indices_H, histories.item_E[span])
        np.testing.assert_array_equal(served.kinds_H, histories.kind_E[span])


def test_one_person_contributes_only_the_newest_events_and_rare_items_are_left_out() -> None:
    histories = clean(
        columns_of([[0, 1, 2, 3, 0, 1], [0, 1, 0, 1, 0]]),
        Cleaning(min_user_events=2, min_item_events=2, max_user_events=3),
    )
    assert histories.item_ids == ["item-0", "item-1"]
    # Items 2 and 3 occur once; what they kept apart is no run here.
    assert histories.item_E.tolist() == [1, 0, 1, 0, 1, 0]


def test_the_last_event_is_held_out_and_never_one_that_was_seen_before() -> None:
    histories = clean(columns_of([[0, 1, 2], [0, 1, 0], [3, 4]]), Cleaning())
    new_only = hold_out(histories, 1, exclude_seen=True)
    everyone = hold_out(histories, 1, exclude_seen=False)
    assert new_only.target_B.tolist() == [2, 4]
    assert everyone.target_B.tolist() == [2, 0, 4]
    assert [new_only.prefix(histories, 0)[0].tolist(), new_only.prefix(histories, 1)[0].tolist()] == [
        [0, 1],
        [3],
    ]
    assert hold_out(histories, 2, exclude_seen=True).user_B.tolist() == [0, 1]


def test_typed_attributes_go_before_words_and_values_of_one_item_tell_nothing() -> None:
    attributes_of = {
        "a": ["brand:x", "word:red", "word:blue"],
        "b": ["brand:x", "word:red", "brand:only-here"],
        "c": ["word:red"],
    }
    encoded = encode_attributes(["a", "b", "c", "d"], attributes_of, max_places=1, min_items_of_word=2)
    assert encoded.attribute_count == 2
    assert encoded.attribute_IP.tolist() == [[1], [1], [2], [0]]


def test_what_only_training_needs_goes_back_to_the_system_and_the_model_reads_as_before() -> None:
    from services.trainer.pipeline.describing import resident_bytes
    from services.trainer.pipeline.sequence_model import SequenceModel

    items = 150_000
    attributes = ItemAttributes(np.zeros((items, 0), np.int32), 0)
    model = SequenceModel(items, attributes, resolve("tiny", {"dimension": 64}), seed=1)
    model.set_weights([np.random.default_rng(n).normal(size=w.shape) for n, w in enumerate(model.weights())])
    for moments in model._moments:
        for moment in moments:
            moment.assign_add(np.ones(moment.shape, np.float32))
    # The averages begin as the tables and may lie where those do.
    vectors_ID, held_before = model.item_vectors(), resident_bytes()
    model.end_training()
    table_bytes = vectors_ID.nbytes
    assert held_before - resident_bytes() > 1.9 * table_bytes
    np.testing.assert_array_equal(model.item_vectors(), vectors_ID)


def test_averages_that_lie_where_the_tables_do_are_not_forgotten() -> None:
    from services.trainer.pipeline.sequence_model import SequenceModel

    model = SequenceModel(
        5_000, ItemAttributes(np.zeros((5_000, 0), np.int32), 0), resolve("tiny", {}), seed=2
    )
    vectors_ID = model.item_vectors()
    model._averages[0].assign(model.id_table.read_value())
    model.end_training()
    np.testing.assert_array_equal(model.item_vectors(), vectors_ID)
