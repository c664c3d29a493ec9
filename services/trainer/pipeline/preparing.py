"""From events to what a training needs before its first step: histories, splits, attributes, counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from services.trainer.domain.hyper_parameters import HyperParameters
from services.trainer.pipeline.blend import Terms
from services.trainer.pipeline.content import ContentVectors, align
from services.trainer.pipeline.cooccurrence import PairCounts
from services.trainer.pipeline.dataset import (
    EventColumns,
    HeldOut,
    Histories,
    ItemAttributes,
    Split,
    clean,
    encode_attributes,
    require_enough,
)
from services.trainer.pipeline.evaluation import choose_half_life, popularity, sample_rows
from services.trainer.pipeline.plan import Plan, split_of
from services.trainer.pipeline.warm_start import InitialWeights, only_newer, shortened

# Held-out events that early stopping looks at: enough for a stable NDCG, cheap beside a pass.
_VALIDATION_CELLS = 30_000_000
_VALIDATION_USERS = (500, 3_000)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Events, cleaned and split.

    Attributes:
        histories: all of them.
        split: what is held out, of everybody.
        training, before_test: the events of training, and those before the test.
        validation, test: what is measured on, some people of the split.
        answered_after_all_U: see `Plan.answered_after_all`.
        attributes: of the items.
        size: of the model; a refresh makes fewer passes.
    """

    histories: Histories
    split: Split
    training: Histories
    before_test: Histories
    validation: HeldOut
    test: HeldOut
    answered_after_all_U: np.ndarray
    attributes: ItemAttributes
    size: HyperParameters

    def describe(self) -> str:
        """Returns how much there is, in words."""
        with_content = "" if self.attributes.content_IC is None else ", content vectors"
        return (
            f"{self.histories.user_count:,} people, {self.histories.item_count:,} items, "
            f"{len(self.histories.item_E):,} events, "
            f"{self.attributes.attribute_count:,} attribute values{with_content}."
        )


def split_events(
    events: EventColumns,
    size: HyperParameters,
    plan: Plan,
    initial: InitialWeights | None,
    newer_than_microseconds: int | None,
) -> tuple[Histories, Split, HyperParameters]:
    """Returns clean histories, what is held out of them, and the size to train.

    Raises:
        FailedPrecondition: TOO_LITTLE_DATA.
    """
    histories = clean(events, plan.cleaning)
    require_enough(histories)
    split = split_of(histories, plan)
    if initial is not None:
        newer_than_microseconds, size = initial.last_event_microseconds, shortened(size)
    if newer_than_microseconds is not None:
        split = only_newer(newer_than_microseconds, histories, split)
    return histories, split, size


def prepare(
    histories: Histories,
    split: Split,
    size: HyperParameters,
    attributes_of: Mapping[str, Sequence[str]],
    content: ContentVectors | None,
    plan: Plan,
    seed: int,
) -> Prepared:
    """Returns the parts of the split, whom it is measured on, and the items' attributes as numbers."""
    low, high = _VALIDATION_USERS
    limit = min(high, max(low, _VALIDATION_CELLS // histories.item_count))
    answered_after_all_U = np.isin(histories.user_U, list(plan.answered_after_all))
    test = split.test.take(np.flatnonzero(~answered_after_all_U[split.test.user_B]))
    return Prepared(
        histories,
        split,
        training=histories.first(split.training_U),
        before_test=histories.first(split.before_test_U),
        validation=split.validation.take(sample_rows(len(split.validation), limit, seed)),
        test=test.take(sample_rows(len(test), plan.max_test_users, seed)),
        answered_after_all_U=answered_after_all_U,
        attributes=replace(
            encode_attributes(histories.item_ids, attributes_of),
            content_IC=align(histories.item_ids, content),
        ),
        size=size,
    )


class Counted:
    """What is counted and not learned: pairs, and popularity; later events are added as the run goes on."""

    def __init__(self, prepared: Prepared, exclude_seen: bool) -> None:
        histories, self._prepared = prepared.histories, prepared
        self._counts = PairCounts(
            histories.item_count, prepared.size.cooccurrence_window, len(histories.item_E)
        )
        self._counts.add(histories, 0, prepared.split.training_U)
        self.half_life_days = choose_half_life(
            histories, prepared.validation, prepared.training, exclude_seen
        )

    def of_training(self) -> Terms:
        """Returns the terms of the training events."""
        return self._terms(self._prepared.training)

    def with_validation(self) -> Terms:
        """Adds the events before the test; returns the terms."""
        split = self._prepared.split
        self._counts.add(self._prepared.histories, split.training_U, split.before_test_U)
        return self._terms(self._prepared.before_test)

    def with_everything(self) -> Terms:
        """Adds the rest; returns the terms."""
        self._counts.add(self._prepared.histories, self._prepared.split.before_test_U)
        return self._terms(self._prepared.histories)

    def _terms(self, known: Histories) -> Terms:
        return Terms.of(self._counts, self._prepared.attributes, popularity(known, self.half_life_days))
