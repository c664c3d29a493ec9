"""From events to clean histories, and which of them are held out. Pure NumPy.

E = events, U = people, I = items. Histories lie one after the other in flat
arrays; `start_U1` says where each begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shared.bundle.history import mark_clean_events
from shared.errors import FailedPrecondition

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class EventColumns:
    """The log as columns, in no particular order.

    Attributes:
        user_E: an integer a person, int64. Nothing else is known of them here.
        item_E: index into `item_ids`, int32.
        kind_E: EventKind, int32.
        time_E: microseconds since 1970, int64.
        order_E: breaks ties of time, such as the place within a basket, int64.
        item_ids: raw ids.
        watermark: snapshot of the log that was read, as `Watermark.encode`; empty for files.
        snapshot: digest of the set of day files that was read; empty where none was.
    """

    user_E: Int64
    item_E: Int32
    kind_E: Int32
    time_E: Int64
    order_E: Int64
    item_ids: Sequence[str]
    watermark: bytes = b""
    snapshot: str = ""

    def __len__(self) -> int:
        return len(self.user_E)


@dataclass(frozen=True, slots=True, eq=False)
class Histories:
    """Clean histories, oldest event first, one person after the other.

    Attributes:
        start_U1: (U + 1,) offsets, int64.
        item_E, kind_E: int32.
        time_E: microseconds, int64.
        item_ids: raw ids in index order; each occurs in some history.
        user_U: the number of each person in the events that were cleaned.
    """

    start_U1: Int64
    item_E: Int32
    kind_E: Int32
    time_E: Int64
    item_ids: Sequence[str]
    user_U: Int64

    @property
    def user_count(self) -> int:
        """U."""
        return len(self.start_U1) - 1

    @property
    def item_count(self) -> int:
        """I."""
        return len(self.item_ids)

    @property
    def length_U(self) -> Int64:
        """Events of each person."""
        return np.diff(self.start_U1)

    def without_last(self, count: int) -> Histories:
        """Returns every history without its last `count` events; shorter ones become empty."""
        return self.first(np.maximum(self.length_U - count, 0))

    def first(self, keep_U: Int64) -> Histories:
        """Returns the first `keep_U` events of each history."""
        kept = flat_positions(self.start_U1[:-1], keep_U)
        start_U1 = np.concatenate([[0], np.cumsum(keep_U)])
        return Histories(
            start_U1, self.item_E[kept], self.kind_E[kept], self.time_E[kept], self.item_ids, self.user_U
        )


@dataclass(frozen=True, slots=True)
class Cleaning:
    """What takes part. See `DataWindow` in the proto."""

    min_user_events: int = 1
    min_item_events: int = 1
    max_user_events: int = 200


def flat_positions(start_U: Int64, length_U: Int64) -> Int64:
    """Returns start, start + 1, … of every run, one run after the other."""
    end_U = np.cumsum(length_U)
    total = int(end_U[-1]) if len(end_U) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(start_U - (end_U - length_U), length_U)


def clean(events: EventColumns, cleaning: Cleaning) -> Histories:
    """Returns the histories of the people and items that take part.

    Order: kinds of interest and runs of one item (`shared.bundle.history`), rare items, the newest
    events of each person, people with too few. Item indices are given anew, by first occurrence in
    `item_ids`.
    """
    order = np.lexsort((events.order_E, events.time_E, events.user_E))
    user_E, item_E = events.user_E[order], events.item_E[order]
    kind_E, time_E = events.kind_E[order], events.time_E[order]
    keep_E = mark_clean_events(user_E, item_E, kind_E)
    if cleaning.min_item_events > 1:
        count_I = np.bincount(item_E[keep_E], minlength=len(events.item_ids))
        rare_E = count_I[item_E] < cleaning.min_item_events
        # Runs are collapsed anew: what a rare item kept apart may now be a run.
        keep_E = mark_clean_events(user_E, np.where(rare_E, -1, item_E), kind_E)
    user_E, item_E, kind_E, time_E = user_E[keep_E], item_E[keep_E], kind_E[keep_E], time_E[keep_E]

    first_E = np.ones(len(user_E), bool)
    first_E[1:] = user_E[1:] != user_E[:-1]
    start_U = np.flatnonzero(first_E)
    length_U = np.diff(np.append(start_U, len(user_E)))
    capped_U = np.minimum(length_U, cleaning.max_user_events)
    start_U = start_U + length_U - capped_U
    enough_U = capped_U >= cleaning.min_user_events
    kept = flat_positions(start_U[enough_U], capped_U[enough_U])
    start_U1 = np.concatenate([[0], np.cumsum(capped_U[enough_U])]).astype(np.int64)

    known, item_of_E = np.unique(item_E[kept], return_inverse=True)
    return Histories(
        start_U1,
        item_of_E.astype(np.int32),
        kind_E[kept].astype(np.int32),
        time_E[kept],
        [events.item_ids[index] for index in known],
        user_E[start_U[enough_U]],
    )


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Events to predict, from the histories before them.

    Attributes:
        user_B: whose, index into the histories.
        target_B: the item to predict.
        prefix_B: length of the history before it.
    """

    user_B: Int64
    target_B: Int64
    prefix_B: Int64

    def __len__(self) -> int:
        return len(self.user_B)

    def prefix(self, histories: Histories, row: int) -> tuple[Int32, Int32]:
        """Returns items and kinds before the event of a row, oldest first."""
        first = int(histories.start_U1[self.user_B[row]])
        last = first + int(self.prefix_B[row])
        return histories.item_E[first:last], histories.kind_E[first:last]

    def take(self, rows: Int64) -> HeldOut:
        """Returns some of the rows."""
        return HeldOut(self.user_B[rows], self.target_B[rows], self.prefix_B[rows])


def hold_out(histories: Histories, from_end: int, exclude_seen: bool) -> HeldOut:
    """Returns the last event of each person (`from_end` 1), or the one before (2).

    Needs `from_end` + 1 events. With `exclude_seen`, an event whose item the person had before is
    not held out: no ranking that leaves seen items out could contain it.
    """
    return _hold_out_at(histories, histories.length_U - from_end, exclude_seen)


def everyone(histories: Histories, after_all_U: npt.NDArray[np.bool_] | None = None) -> HeldOut:
    """Returns the last event of each person, also of those who have no other, and whatever they had before.

    Args:
        after_all_U: people whose last event belongs to their history, so that nothing is left to foretell.
    """
    user_B = np.flatnonzero(histories.length_U > 0)
    last_B = histories.length_U[user_B] - 1
    target_B = histories.item_E[histories.start_U1[user_B] + last_B].astype(np.int64)
    if after_all_U is not None:
        last_B = last_B + after_all_U[user_B]
    return HeldOut(user_B, target_B, last_B)


def _hold_out_at(histories: Histories, place_U: Int64, exclude_seen: bool) -> HeldOut:
    """Returns the event at a place of each history that has it, and one before it."""
    user_B = np.flatnonzero((place_U >= 1) & (place_U < histories.length_U))
    prefix_B = place_U[user_B]
    target_B = histories.item_E[histories.start_U1[user_B] + prefix_B].astype(np.int64)
    if exclude_seen:
        positions = flat_positions(histories.start_U1[user_B], prefix_B)
        row_P = np.repeat(np.arange(len(user_B)), prefix_B)
        seen_B = np.bincount(
            row_P, histories.item_E[positions] == target_B[row_P], minlength=len(user_B)
        ).astype(bool)
        user_B, target_B, prefix_B = user_B[~seen_B], target_B[~seen_B], prefix_B[~seen_B]
    return HeldOut(user_B, target_B, prefix_B)


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """What is trained on, what chooses, what judges.

    Attributes:
        training_U, before_test_U: events of each history in training, and before the test.
        validation, test: the held-out events.
        words: the protocol, for people.
    """

    training_U: Int64
    before_test_U: Int64
    validation: HeldOut
    test: HeldOut
    words: str


def leave_one_out(histories: Histories, exclude_seen: bool) -> Split:
    """Returns the split that tests the last event of each person, and validates on the one before."""
    length_U = histories.length_U
    return Split(
        np.maximum(length_U - 2, 0),
        np.maximum(length_U - 1, 0),
        hold_out(histories, 2, exclude_seen),
        hold_out(histories, 1, exclude_seen),
        "Leave one out: the last event of each person is the test, the one before chose passes and blend",
    )


def split_by_time(
    histories: Histories, exclude_seen: bool, test_share: float = 0.1, test_from: int | None = None
) -> Split:
    """Returns the split at two moments: nothing that is trained on is later than anything that is tested.

    Tests the first event of each person after the second moment, from the events before it.

    Args:
        test_share: share of the events after the second moment; as many lie between the two.
        test_from: the second moment, microseconds; by default from the share.
    """
    later = np.quantile(histories.time_E, 1 - test_share) if test_from is None else test_from
    before = histories.time_E[histories.time_E < later]
    earlier = np.quantile(before, 1 - test_share) if len(before) else later
    user_E = np.repeat(np.arange(histories.user_count), histories.length_U)

    def events_before(moment: float) -> Int64:
        return np.bincount(user_E[histories.time_E < moment], minlength=histories.user_count)

    training_U, before_test_U = events_before(earlier), events_before(later)
    moment = np.datetime64(int(later), "us").astype("datetime64[s]")
    return Split(
        training_U,
        before_test_U,
        _hold_out_at(histories.first(before_test_U), training_U, exclude_seen),
        _hold_out_at(histories, before_test_U, exclude_seen),
        f"Global time split: the first event of each person from {moment} UTC on is the test, those shortly before "
        "chose passes and blend",
    )


MIN_USERS = 20


def require_enough(histories: Histories) -> None:
    """Checks that there is something to train on and to measure with.

    Raises:
        FailedPrecondition: TOO_LITTLE_DATA.
    """
    users = int((histories.length_U >= 3).sum())
    if users < MIN_USERS or histories.item_count < 5:
        raise FailedPrecondition(
            "TOO_LITTLE_DATA",
            f"Too little data: {users} people with at least 3 events of interest on {histories.item_count} items; "
            f"need {MIN_USERS} people and 5 items. Record or import more events, or widen the window.",
            {"users": str(users), "items": str(histories.item_count)},
        )


WORD = "word:"


@dataclass(frozen=True, slots=True, eq=False)
class ItemAttributes:
    """What the catalogue says of items, as numbers.

    Attributes:
        attribute_IP: (I, P) int32, attribute index + 1 of each place; 0 is an empty place.
        attribute_count: A.
        names: (A,) the values themselves, in the order of their indices.
        content_IC: vectors of text and pictures, see `content.align`; None where there are none.
    """

    attribute_IP: Int32
    attribute_count: int
    content_IC: Float32 | None = None
    names: Sequence[str] = ()


def encode_attributes(
    item_ids: Sequence[str],
    attributes_of: Mapping[str, Sequence[str]],
    max_places: int = 12,
    min_items: int = 2,
    min_items_of_word: int = 5,
) -> ItemAttributes:
    """Returns attribute indices by item; values on too few items tell nothing and are dropped.

    An item with more than `max_places` values keeps typed values before words of its title, and of each the
    rarest, which say most. Words begin with `word:`.
    """
    items_with: dict[str, int] = {}
    for item_id in item_ids:
        for value in set(attributes_of.get(item_id, ())):
            items_with[value] = items_with.get(value, 0) + 1
    kept = sorted(
        value
        for value, count in items_with.items()
        if count >= (min_items_of_word if value.startswith(WORD) else min_items)
    )
    index = {value: place + 1 for place, value in enumerate(kept)}
    rows = []
    for item_id in item_ids:
        values = {value for value in attributes_of.get(item_id, ()) if value in index}
        rarest = sorted(values, key=lambda value: (value.startswith(WORD), items_with[value], value))[
            :max_places
        ]
        rows.append(sorted(index[value] for value in rarest))
    places = max((len(row) for row in rows), default=0)
    attribute_IP = np.zeros((len(item_ids), places), np.int32)
    for row, values_of_row in enumerate(rows):
        attribute_IP[row, : len(values_of_row)] = values_of_row
    return ItemAttributes(attribute_IP, len(kept), names=kept)
