"""What the use cases need of the world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from services.recommend.domain.catalog import Catalog
from services.recommend.domain.filter_expression import Expression
from services.recommend.domain.history import History
from services.recommend.domain.rules import Rule
from services.recommend.domain.serving_config import ServingConfig
from services.recommend.domain.status import ModelState, StreamState
from shared.experiments import Split
from shared.identity import UserKey
from shared.tokens import ConsistencyToken

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ModelHistory:
    """A history as a model reads it: only what it knows, runs of one item taken together.

    Attributes:
        indices_H: indices of the model, int64, oldest first.
        kinds_H: event kinds, int32.
        places_H: places in the `History` that it was made of, int64.
    """

    indices_H: Int64
    kinds_H: npt.NDArray[np.int32]
    places_H: Int64

    def __len__(self) -> int:
        return len(self.indices_H)

    def without(self, place: int) -> ModelHistory:
        """Returns the history without its event at `place`."""
        keep = np.arange(len(self)) != place
        return ModelHistory(self.indices_H[keep], self.kinds_H[keep], self.places_H[keep])


@dataclass(frozen=True, slots=True)
class CompanionScores:
    """What is added to the Transformer's log-softmax of every item; all float32, (I,).

    Attributes:
        cooccurrence_I: c, what was counted forward, before it is weighted.
        counted_I: what counts and repeats add.
        content_I: what attributes add; None where the model knows none.
    """

    cooccurrence_I: Float32
    counted_I: Float32
    content_I: Float32 | None = None


class Model(Protocol):
    """A model version in memory; immutable, for any number of threads.

    score_i = log_softmax(logits_i) + counted_i + content_i, see `shared.bundle.scoring`.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def created_time(self) -> float | None:
        """When the version was made, seconds since 1970."""

    @property
    def item_count(self) -> int: ...
    @property
    def dimension(self) -> int: ...
    @property
    def max_history(self) -> int: ...
    @property
    def rows_I(self) -> npt.NDArray[np.int32]:
        """The row of each of the model's items, int32, (I,)."""

    @property
    def popularity_I(self) -> Float32:
        """Decayed counts, float32, (I,), at least 0."""

    def indices_of(self, rows: npt.NDArray[np.int32]) -> Int64:
        """Returns the model's index of each row, -1 where it does not know the item, int64."""

    def cosines(self, index: int) -> Float32:
        """Returns the cosine of one item's vector with every item's, float32, (I,)."""

    def unit_vectors(self, indices: Int64) -> Float32:
        """Returns vectors of length 1, float32, (C, D); zeros for index -1."""

    def vectors(self, indices: Int64) -> Float32:
        """Returns item vectors, float32, (C, D)."""

    def similarities(self, portrait_D: Float32, moment_D: Float32, alpha: float) -> Float32:
        """Returns sim(U, I) of every item, float32, (I,); see `domain.cosine`."""

    def read_history(self, history: History) -> ModelHistory:
        """Returns what the model reads of a history."""

    def encode(self, history: ModelHistory) -> Float32:
        """Returns the query vector of a history, float32, (D,)."""

    def logits(self, query_D: Float32) -> Float32:
        """Returns sequence * v_i · q + bias_i of every item, float32, (I,)."""

    def cooccurrence(self, history: ModelHistory) -> Float32:
        """Returns c of every item, float32, (I,)."""

    def cooccurrence_contributions(self, history: ModelHistory, indices_C: Int64) -> Float32:
        """Returns what each event of the history adds to c of each candidate, float32, (C, H)."""

    def companion(self, history: ModelHistory) -> CompanionScores:
        """Returns what is added to the log-softmax for a history."""

    def counted_losses(self, history: ModelHistory, indices_C: Int64) -> Float32:
        """Returns by how much counts and repeats would add less without each event, float32, (C, H)."""

    def candidate_logits(self, queries_QD: Float32, indices_C: Int64) -> Float32:
        """Returns the logits of some items for several queries, float32, (Q, C)."""

    def added_without(self, history: ModelHistory, places_E: Int64, indices_C: Int64) -> Float32:
        """Returns what would be added to some items' log-softmax without each of some events, float32, (E, C)."""

    def damped(self, c: Float32) -> Float32:
        """Returns log(1 + scale * c), without the weight of the blend."""

    def blend(self, logits_I: Float32, companion: CompanionScores) -> Float32:
        """Returns the score of every item, float32, (I,)."""

    @property
    def has_ranker(self) -> bool:
        """Whether the version has a second stage."""

    @property
    def outcome_weights(self) -> tuple[float, float, float]:
        """What a click, a cart addition and a purchase were worth when the second stage was judged."""

    def outcomes(
        self,
        history: History,
        read: ModelHistory,
        now: float,
        indices_C: Int64,
        score_C: Float32,
        rank_C: Int64,
        cooccurrence_I: Float32 | None,
    ) -> Float32:
        """Returns the probability of a click, a cart addition and a purchase of each candidate, float32, (C, 3).

        Only where `has_ranker`.

        Args:
            history, read: what the shopper did, and how the model read it.
            now: seconds since 1970.
            score_C, rank_C: of the first stage, the best first; ranks from 1.
            cooccurrence_I: c of every item where it is known.
        """

    @property
    def is_searched(self) -> bool:
        """Whether there are too many items for a pass over all; then `candidates` finds some thousands."""

    def candidates(self, query_D: Float32, history: ModelHistory, count: int) -> tuple[Int64, float]:
        """Returns items of high scores, ascending, (C,), and log sum_i exp logits_i, estimated.

        The `count` best by logit, nearly (recall is measured), as many by co-occurrence, and the
        history's own items.
        """

    def log_partitions(self, queries_QD: Float32) -> Float32:
        """Returns log sum_i exp logits_i of each query, (Q,); from a sample of the items where `is_searched`."""

    def score_candidates(
        self, query_D: Float32, history: ModelHistory, indices_C: Int64, log_partition_of_query: float
    ) -> Float32:
        """Returns the scores of some items, float32, (C,): those of `blend`, where the partition is exact."""


class ModelSource(Protocol):
    """Where the model in service is found."""

    def current(self) -> Model | None:
        """Returns the model in service, None before there is one."""

    def state(self) -> ModelState:
        """Returns what is in service, and what was refused."""


class Models(Protocol):
    """The models in service, by name and alias."""

    def source(self, model: str, alias: str) -> ModelSource | None:
        """Returns where a model is found, "" each for the service's own; None where nobody follows it yet."""

    def states(self) -> list[ModelState]:
        """Returns the state of each, the service's own first."""


class Experiments(Protocol):
    """The experiments that run, as far as is known."""

    def split(self, placement: str) -> Split | None:
        """Returns how the experiment on a placement divides people; None where there is none."""


class CatalogSource(Protocol):
    """Where the catalogue is found."""

    @property
    def current(self) -> Catalog:
        """The newest state of the catalogue."""

    def publish(self) -> Catalog:
        """Makes staged changes and new rows of the item index visible, and returns the state."""


@dataclass(frozen=True, slots=True)
class LiveHistory:
    """What the profile service knows of one shopper's recent events.

    Attributes:
        segments: those the shopper is in, their stage of life ("stage:…") among them.
    """

    history: History
    personalisation: bool
    watermark: bytes
    segments: Sequence[str] = ()


class LiveProfiles(Protocol):
    """The live histories, held in memory and asked for on a miss."""

    def cached(self, user_key: UserKey) -> LiveHistory | None:
        """Returns what is held of a shopper, None where nothing is."""

    def covers(self, token: ConsistencyToken) -> bool:
        """Returns whether the stream has passed the token."""

    def wait_until_covers(self, token: ConsistencyToken, timeout_seconds: float) -> bool:
        """Waits until the stream has passed the token; returns whether it has."""

    def fetch(self, user_key: UserKey, consistency_text: str, timeout_seconds: float) -> LiveHistory:
        """Asks the profile service; concurrent calls for one shopper make one call.

        Raises:
            ShopkeeperError: it cannot be had in time.
        """

    def state(self) -> StreamState:
        """Returns how the stream is doing."""


class CatalogStream(Protocol):
    """The stream that keeps the catalogue up to date."""

    def state(self) -> StreamState:
        """Returns how the stream is doing."""


class FilterParser(Protocol):
    """Parses filters."""

    def parse(self, text: str, field: str = "filter") -> Expression:
        """Returns the expression of a text; raises InvalidInput INVALID_FILTER."""


class DocumentKind(Enum):
    """What a document of the configuration describes; the value is its directory."""

    SERVING_CONFIG = "serving_configs"
    RULE = "rules"


class Documents(Protocol):
    """Where serving configs and rules are kept, for all replicas alike."""

    def stamps(self) -> Mapping[tuple[DocumentKind, str], tuple[int, int, int]]:
        """Returns a value for each document that changes when its content does."""

    def read(self, kind: DocumentKind, document_id: str) -> bytes | None:
        """Returns a document, None where there is none; raises OSError, ValueError where it cannot be read."""

    def write(self, kind: DocumentKind, document_id: str, content: bytes) -> None:
        """Replaces a document, on disk before it returns; raises Unavailable, and the old one stays."""

    def delete(self, kind: DocumentKind, document_id: str) -> None:
        """Deletes a document; raises Unavailable."""

    def turn(self) -> AbstractContextManager[None]:
        """Returns a context that at most one writer of all replicas is in."""


class Codec(Protocol):
    """The form of the documents. Decoding validates as a call of the API does."""

    def encode_config(self, config: ServingConfig) -> bytes:
        """Returns the document of a serving config."""

    def decode_config(self, document_id: str, content: bytes) -> ServingConfig:
        """Returns the serving config of a document; raises InvalidInput."""

    def encode_rule(self, rule: Rule) -> bytes:
        """Returns the document of a rule."""

    def decode_rule(self, document_id: str, content: bytes) -> Rule:
        """Returns the rule of a document; raises InvalidInput."""


class Clock(Protocol):
    """Time."""

    def now(self) -> float:
        """Returns seconds since 1970, UTC."""

    def monotonic(self) -> float:
        """Returns seconds that never go back."""


class Observer(Protocol):
    """Who is told how answers went, for metrics."""

    def stages(self, seconds: Sequence[tuple[str, float]]) -> None:
        """The stages of one answer took so long, by name."""

    def degraded(self, cause: str) -> None:
        """An answer went without something."""
