"""The simulated shop behaves as its description says, and nothing in it favours a recommender."""

from __future__ import annotations

import numpy as np
import pytest

from shared.event_kinds import EventKind
from shared.importing.batches import EventBatch
from shared.simulation.history import Scale, World, make_history
from shared.simulation.shop import Ints
from shared.simulation.shoppers import NO_ITEM, begin_visits, look_at_page, utilities

SCALE = Scale(seed=7, shoppers=400, items=240, bot_share=0.02)


@pytest.fixture(scope="module")
def past() -> tuple[World, EventBatch]:
    return make_history(SCALE)


@pytest.fixture
def world() -> World:
    return make_history(SCALE)[0]


def visits(world: World) -> Ints:
    rows = np.flatnonzero(~world.crowd.is_bot)
    begin_visits(world.rng, world.shop, world.crowd, rows, np.full(rows.size, SCALE.days + 1.0))
    return rows


def clicks(world: World, rows: Ints, page: Ints, seed: int = 3) -> np.ndarray:
    return look_at_page(np.random.default_rng(seed), world.shop, world.crowd, rows, page).clicked_position


def best_first(world: World, rows: Ints) -> Ints:
    everything = np.broadcast_to(np.arange(len(world.shop)), (rows.size, len(world.shop)))
    return np.argsort(-utilities(world.shop, world.crowd, rows, everything), axis=1)


def test_the_same_seed_gives_the_same_bytes(past: tuple[World, EventBatch]) -> None:
    _, again = make_history(SCALE)
    batch = past[1]
    assert list(again.event_ids) == list(batch.event_ids)
    assert list(again.item_ids) == list(batch.item_ids)
    assert again.occurred_at_us.tobytes() == batch.occurred_at_us.tobytes()
    assert again.kinds.tobytes() == batch.kinds.tobytes()


def test_another_seed_gives_another_past(past: tuple[World, EventBatch]) -> None:
    other = make_history(Scale(seed=8, shoppers=400, items=240, bot_share=0.02))[1]
    assert list(other.item_ids) != list(past[1].item_ids)


def test_history_is_in_order_and_lies_in_its_days(past: tuple[World, EventBatch]) -> None:
    times = past[1].occurred_at_us
    assert (np.diff(times) >= 0).all()
    assert times[0] >= SCALE.end_us - SCALE.days * 86_400_000_000
    assert times[-1] <= SCALE.end_us
    assert (times % 1_000 == 0).all()


def test_event_ids_are_distinct_and_every_kind_of_behaviour_occurs(past: tuple[World, EventBatch]) -> None:
    batch = past[1]
    assert len(set(batch.event_ids)) == len(batch)
    kinds = {EventKind(k) for k in np.unique(batch.kinds).tolist()}
    assert kinds == {
        EventKind.SEARCH, EventKind.ITEM_VIEW, EventKind.ADD_TO_CART, EventKind.REMOVE_FROM_CART, EventKind.PURCHASE,
        EventKind.RETURN,
    }  # fmt: skip


def test_nothing_is_returned_that_was_not_bought_before(past: tuple[World, EventBatch]) -> None:
    batch = past[1]
    bought: set[tuple[str, str]] = set()
    for e in range(len(batch)):
        items = batch.item_ids[batch.offsets[e] : batch.offsets[e + 1]]
        pairs = {(batch.user_ids[e], item) for item in items}
        if batch.kinds[e] == EventKind.PURCHASE:
            bought |= pairs
        elif batch.kinds[e] == EventKind.RETURN:
            assert pairs <= bought


def test_who_minds_the_price_more_is_drawn_less_by_a_dear_item(world: World) -> None:
    rows = visits(world)
    dear = int(np.argmax(world.shop.relative_log_price))
    page = np.full((rows.size, 1), dear)
    means = []
    for sensitivity in (0.0, 0.5, 1.0, 2.0, 4.0):
        world.crowd.price_sensitivity[:] = sensitivity
        means.append(float(utilities(world.shop, world.crowd, rows, page).mean()))
    assert means == sorted(means, reverse=True)
    assert len(set(means)) == len(means)


def test_an_item_bores_who_has_seen_it(world: World) -> None:
    rows = visits(world)
    page = np.zeros((rows.size, 1), np.int64)
    before = utilities(world.shop, world.crowd, rows, page)
    world.crowd.seen[rows, 0] += 5
    after = utilities(world.shop, world.crowd, rows, page)
    assert (after <= before).all()
    assert after.mean() < before.mean()


def test_the_same_item_gets_fewer_clicks_the_lower_it_stands() -> None:
    rates = []
    for position in (0, 3, 9):
        fresh = make_history(SCALE)[0]
        rows = visits(fresh)
        page = np.full((rows.size, 10), NO_ITEM)
        page[:, position] = best_first(fresh, rows)[:, 0]
        rates.append((clicks(fresh, rows, page) == position).mean())
    assert rates[0] > rates[1] > rates[2] > 0


def test_an_oracle_beats_best_sellers_and_those_beat_chance(
    world: World, past: tuple[World, EventBatch]
) -> None:
    index = {item: n for n, item in enumerate(world.shop.item_ids)}
    sold = np.bincount([index[i] for i in past[1].item_ids], minlength=len(index))
    rates = {}
    for name in ("oracle", "popular", "random"):
        fresh = make_history(SCALE)[0]
        rows = visits(fresh)
        if name == "oracle":
            page = best_first(fresh, rows)[:, :10]
        elif name == "popular":
            page = np.broadcast_to(np.argsort(-sold)[:10], (rows.size, 10))
        else:
            page = np.random.default_rng(1).integers(0, len(index), (rows.size, 10))
        rates[name] = (clicks(fresh, rows, page) >= 0).mean()
    assert rates["oracle"] > 2 * rates["popular"]
    assert rates["popular"] > rates["random"]


def test_what_comes_next_depends_on_what_was_just_done(past: tuple[World, EventBatch]) -> None:
    """The commonest successor of an item is a better guess of the next view than the best-seller."""
    batch = past[1]
    index = {item: n for n, item in enumerate(past[0].shop.item_ids)}
    views: dict[str, list[int]] = {}
    for e in np.flatnonzero(batch.kinds == EventKind.ITEM_VIEW).tolist():
        views.setdefault(batch.user_ids[e], []).append(index[batch.item_ids[batch.offsets[e]]])
    follows = np.zeros((len(index), len(index)))
    sold = np.zeros(len(index))
    last: list[tuple[int, int]] = []
    for sequence in views.values():
        if 3 <= len(sequence) < 200:
            np.add.at(follows, (sequence[:-2], sequence[1:-1]), 1)
            np.add.at(sold, sequence[:-1], 1)
            last.append((sequence[-2], sequence[-1]))
    best = set(np.argsort(-sold)[:10].tolist())
    by_sale = np.mean([y in best for _, y in last])
    by_sequence = np.mean([y in np.argsort(-follows[x], kind="stable")[:10] for x, y in last])
    assert by_sequence > 1.5 * by_sale


def test_bots_stand_out_by_pace_and_never_buy(past: tuple[World, EventBatch]) -> None:
    world, batch = past
    bots = {world.user_id(row) for row in np.flatnonzero(world.crowd.is_bot).tolist()}
    assert bots
    for user in sorted(set(batch.user_ids)):
        rows = [e for e, u in enumerate(batch.user_ids) if u == user] if user in bots else []
        if rows:
            gaps = np.diff(batch.occurred_at_us[rows]) / 1e6
            assert np.median(gaps) < 2, "a page a second"
            assert set(batch.kinds[rows].tolist()) == {int(EventKind.ITEM_VIEW)}


def test_nobody_clicks_what_is_not_there(world: World) -> None:
    rows = visits(world)
    choices = look_at_page(world.rng, world.shop, world.crowd, rows, np.full((rows.size, 10), NO_ITEM))
    assert (choices.clicked == NO_ITEM).all()


def test_every_item_of_the_catalogue_says_that_it_is_simulated(world: World) -> None:
    assert all(record.attributes["simulated"] is True for record in world.shop.records())
