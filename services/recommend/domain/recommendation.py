"""What is asked, and what is answered, without a transport."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum

import numpy as np
import numpy.typing as npt

from services.recommend.domain.item_index import ItemIndex
from services.recommend.domain.serving_config import ServingConfig
from services.recommend.domain.source import Source as Source
from shared.identity import UserKey
from shared.tokens import AttributionToken, ConsistencyToken


class ListKind(Enum):
    """Which question is asked."""

    RECOMMEND = "recommend"
    SIMILAR = "similar"
    TOGETHER = "together"
    BUY_AGAIN = "buy_again"
    TRENDING = "trending"
    CART = "cart"


class ReasonKind(IntEnum):
    """Why an item is recommended; numbered as `Reason.Kind` in the contract."""

    BECAUSE_YOU_VIEWED = 1
    BECAUSE_YOU_BOUGHT = 2
    BECAUSE_YOU_SAVED = 3
    SEQUENCE = 4
    POPULAR = 5
    TRENDING = 6
    SIMILAR_TO = 7
    BOUGHT_TOGETHER = 8
    BUY_AGAIN = 9
    NEW_ITEM = 10
    RULE = 11
    EXPLORATION = 12
    POPULAR_IN_SEGMENT = 13


class Cause(IntEnum):
    """What an answer went without; numbered as `Degradation.Cause` in the contract."""

    NO_MODEL = 1
    NO_POPULARITY = 2
    NO_ITEMS = 3
    PROFILE_STALE = 4
    PROFILE_UNAVAILABLE = 5
    CONSISTENCY_NOT_REACHED = 6
    CATALOG_UNAVAILABLE = 7
    CATALOG_STALE = 8
    DEADLINE_DIVERSITY_SKIPPED = 9
    DEADLINE_EXPLANATIONS_SKIPPED = 10
    DEADLINE_PROFILE_SKIPPED = 11
    ENCODER_SKIPPED = 12
    FILTER_FALLBACK = 13
    SNAPSHOT_CHANGED = 14
    ITEM_UNKNOWN_TO_MODEL = 15
    NO_PERSONALISATION_CONSENT = 16
    RANKER_SKIPPED = 17


class Verdict(IntEnum):
    """What speaks against an item; numbered as `FilterVerdict` in the contract."""

    PASSED = 1
    NOT_IN_CATALOG = 2
    WITHDRAWN = 3
    OUT_OF_STOCK = 4
    NOT_AVAILABLE_NOW = 5
    EXCLUDED = 6
    IN_CART = 7
    OWNED = 8
    FILTER_EXPRESSION = 9
    CONTEXT_ITEM = 10
    RULE = 11
    NO_SCORE = 12
    SEEN = 13


@dataclass(frozen=True, slots=True)
class Degradation:
    """A step that an answer went without, and why, for an operator."""

    cause: Cause
    text: str


SNAPSHOT_CHANGED = Degradation(
    Cause.SNAPSHOT_CHANGED, "the model changed since the answer before; this one is of the new model"
)


@dataclass(frozen=True, slots=True)
class ContextEvent:
    """What the shopper does right now. `time` is in seconds since 1970; None is now."""

    item_id: str
    kind: int
    time: float | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Where a page begins.

    Attributes:
        offset: items on the pages before.
        model_version, catalog_version: of the page before; "" and 0 on the first.
        seed: of the first page.
        shown_digests: low 32 bits of the digests of all items on the pages before, uint32. They
            are left out, so that nothing repeats though model, catalogue or history change meanwhile.
    """

    offset: int = 0
    model_version: str = ""
    seed: int = 0
    shown_digests: npt.NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32))


@dataclass(frozen=True, slots=True)
class Query:
    """A question, converted and validated.

    Attributes:
        item_ids: the item of SIMILAR, the items of TOGETHER, the cart of CART; else empty.
        consistency: the token, and its text for whoever must be asked.
        page_size: in [1, 100], or 0 for the placement's default.
        window_seconds: of TRENDING.
        assignable: serving config and variant are left to the experiment on the placement, if there is one.
        fingerprint: digest of all fields but the page, by which a page token knows its request.
    """

    kind: ListKind
    user_key: UserKey | None = None
    placement: str = "home"
    serving_config: str = "default"
    item_ids: tuple[str, ...] = ()
    page_size: int = 0
    page: Page = field(default_factory=Page)
    filter_text: str = ""
    fill_up: bool = False
    context_events: tuple[ContextEvent, ...] = ()
    cart_item_ids: tuple[str, ...] = ()
    exclude_item_ids: tuple[str, ...] = ()
    consistency: ConsistencyToken | None = None
    consistency_text: str = ""
    seed: int = 0
    explained: bool = False
    traced: bool = False
    with_records: bool = True
    context_item_id: str = ""
    variant: str = ""
    window_seconds: float = 86_400.0
    assignable: bool = False
    fingerprint: bytes = b""

    def as_explained(self) -> Query:
        """Returns the same question with reasons and trace."""
        return replace(self, explained=True, traced=True)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an item scores as it does; see `Reason` in the contract."""

    kind: ReasonKind
    text: str
    source_item_id: str = ""
    source_event_kind: int = 0
    source_event_time: float | None = None
    contribution: float = 0.0
    rule_id: str = ""
    segment_id: str = ""


@dataclass(frozen=True, slots=True)
class Stage:
    """What one stage did."""

    name: str
    seconds: float
    candidates_in: int
    candidates_out: int
    detail: str


@dataclass(frozen=True, slots=True)
class Freshness:
    """How fresh the data behind an answer are; times in seconds since 1970, None unknown."""

    watermark: bytes = b""
    watermark_time: float | None = None
    newest_event_time: float | None = None
    events_used: int = 0
    catalog_time: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A page of recommendations: K items in parallel arrays.

    Attributes:
        rows_K: rows of the item index, best first.
        scores_K: float32, not increasing with SCORE order only; see `RecommendedItem.score`.
        records: the catalogue's records, None where it has none; empty where not asked for.
        reasons: one tuple an item, or empty where not asked for.
        first_position: position of the first item, from 1.
        expected_K, purchase_counts_K: of BUY_AGAIN, else None.
        next_page: where the next page begins, None where this was the last.
    """

    index: ItemIndex
    rows_K: npt.NDArray[np.int32]
    scores_K: npt.NDArray[np.float32]
    records: Sequence[object | None]
    reasons: Sequence[Sequence[Reason]]
    first_position: int
    expected_K: npt.NDArray[np.float64] | None
    purchase_counts_K: npt.NDArray[np.int64] | None
    attribution: AttributionToken
    model_name: str
    model_version: str
    catalog_version: int
    config: ServingConfig
    variant: str
    degraded: Sequence[Degradation]
    freshness: Freshness
    next_page: Page | None
    stages: Sequence[Stage]
    verdict_counts: Sequence[tuple[Verdict, int]]
    sources: Sequence[Source]


@dataclass(frozen=True, slots=True)
class SourceScore:
    """One source's score of one item."""

    source: Source
    score: float
    contribution: float
    rank: int


@dataclass(frozen=True, slots=True)
class SecondStageScore:
    """What the ranker did to one item; see `ExplainResponse.SecondStage` in the contract."""

    first_stage_score: float
    first_stage_position: int
    position: int
    click_probability: float
    cart_probability: float
    purchase_probability: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why, or why not; see `ExplainResponse` in the contract."""

    recommended: bool
    position: int
    position_by_score: int
    score: float
    page_threshold_score: float
    source_scores: Sequence[SourceScore]
    verdicts: Sequence[Verdict]
    reasons: Sequence[Reason]
    findings: Sequence[str]
    answer: Answer
    rule_ids: Sequence[str] = ()
    second_stage: SecondStageScore | None = None
