"""The model registry, read: which version is in service, and its arithmetic in rows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.recommend.domain.cosine import cosine_similarities
from services.recommend.domain.history import History
from services.recommend.domain.item_index import ItemIndex
from services.recommend.domain.status import ModelState, Refusal
from services.recommend.ports import CompanionScores, Float32, Int64, ModelHistory
from services.recommend.storage.search import MOST_EXACT, ApproximateSearch
from shared.bundle.arrays import release_pages
from shared.bundle.folded import FoldedCompanion
from shared.bundle.history import History as BundleHistory
from shared.bundle.history import encoder_inputs, mark_clean_events
from shared.bundle.ranker import TASKS
from shared.bundle.ranker_features import Taste, feature_matrix, taste_of
from shared.bundle.reader import Bundle, load_bundle
from shared.bundle.registry import PRODUCTION, Registry
from shared.bundle.scoring import (
    cooccurrence_contributions,
    cooccurrence_neighbours,
    cooccurrence_scores,
    log_partition,
    score_candidates,
)
from shared.errors import ShopkeeperError
from shared.telemetry import get_logger

_LOGGER = get_logger("recommend.models")
_MAX_REFUSED = 10
_PENDING_RETRY_SECONDS = 1.0
_MOST_KEPT_ITEMS = 2_000_000
"""Items up to which the version before is kept in memory, for a rollback."""
_PIECE = 262_144
"""Items that are worked on at a time where all of them would be a second copy of the model."""
_MAX_UNIT_VECTORS = 200_000
"""Items up to which vectors of length 1 are kept beside the model's own; beyond, memory matters more."""


class BundleModel:
    """A bundle, speaking in rows of the item index. Implements `ports.Model`."""

    def __init__(self, bundle: Bundle, index: ItemIndex, *, most_exact: int = MOST_EXACT) -> None:
        self._bundle = bundle
        self._matrix = bundle.cooccurrence
        # Mapped, and shared with other processes; warming reads all of them.
        self._item_vectors_ID = np.ascontiguousarray(bundle.item_vectors)
        self._item_bias_I = np.ascontiguousarray(bundle.item_bias)
        self.popularity_I: Float32 = np.ascontiguousarray(bundle.popularity)
        self._inverse_norms_I = _inverse_norms(self._item_vectors_ID)
        self._unit_vectors_ID: Float32 | None = None
        if bundle.item_count <= _MAX_UNIT_VECTORS:
            self._unit_vectors_ID = self._item_vectors_ID * self._inverse_norms_I[:, None]
        self.rows_I = index.intern(bundle.item_ids)
        indices_R = np.full(len(index), -1, dtype=np.int64)
        indices_R[self.rows_I] = np.arange(bundle.item_count)
        self._indices_R = indices_R
        self.name = bundle.model
        self.version = bundle.version
        # Rows are of one process; a version that is loaded again has other arrays and the same content.
        self._token = f"{bundle.model}/{bundle.version}"
        self.item_count = bundle.item_count
        self.dimension = bundle.dimension
        self.max_history = bundle.max_history
        self.created_time = _timestamp(bundle.manifest.get("created_at"))
        self._outcome_weights = _outcome_weights(bundle)
        self._search: ApproximateSearch | None = None
        self._folded: FoldedCompanion | None = None
        if bundle.item_count <= most_exact:
            self._folded = FoldedCompanion.of(bundle.companion)
        else:
            self._search = ApproximateSearch(self._item_vectors_ID, self._item_bias_I)
        # Before warming: that brings back what requests read.
        release_pages(bundle.item_vectors)

    @property
    def has_ranker(self) -> bool:
        return self._bundle.ranker is not None

    @property
    def outcome_weights(self) -> tuple[float, float, float]:
        return self._outcome_weights

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
        ranker = self._bundle.ranker
        assert ranker is not None
        taste: Taste = history.derived(
            "taste",
            self._token,
            lambda: taste_of(ranker.items, read.indices_H, read.kinds_H, history.times_N[read.places_H]),
        )
        if cooccurrence_I is not None:
            c_C = cooccurrence_I[indices_C]
        else:
            together_M, c_M = cooccurrence_neighbours(self._matrix, read.indices_H, self._bundle.scoring)
            c_C = np.zeros(len(indices_C), np.float32)
            if len(together_M):
                place_C = np.minimum(np.searchsorted(together_M, indices_C), len(together_M) - 1)
                hit_C = together_M[place_C] == indices_C
                c_C[hit_C] = c_M[place_C[hit_C]]
        newest = read.indices_H[-1:]
        cosine_C = self.unit_vectors(indices_C) @ self.unit_vectors(newest)[0]
        features_CF = feature_matrix(
            ranker.items,
            taste,
            now,
            indices_C,
            score_C,
            float(score_C[0]),
            rank_C,
            self.damped(c_C),
            cosine_C,
        )
        return ranker.probabilities(features_CF)

    @property
    def is_searched(self) -> bool:
        return self._search is not None

    def candidates(self, query_D: Float32, history: ModelHistory, count: int) -> tuple[Int64, float]:
        assert self._search is not None
        weighted_D = self._weighted(query_D)
        best_C = self._search.best(weighted_D, count)
        partition = self._search.log_partition(weighted_D, self._logits_of(weighted_D, best_C))
        together_M, c_M = cooccurrence_neighbours(self._matrix, history.indices_H, self._bundle.scoring)
        if len(together_M) > count:
            together_M = together_M[np.argpartition(-c_M, count)[:count]]
        return np.unique(np.concatenate([best_C, together_M, history.indices_H])), partition

    def log_partitions(self, queries_QD: Float32) -> Float32:
        weighted_QD = self._weighted(queries_QD)
        if self._search is not None:
            return self._search.sampled_partitions(weighted_QD)
        logits_IQ = self._item_vectors_ID @ weighted_QD.T
        logits_IQ += self._item_bias_I[:, None]
        return log_partition(np.ascontiguousarray(logits_IQ.T))

    def score_candidates(
        self, query_D: Float32, history: ModelHistory, indices_C: Int64, log_partition_of_query: float
    ) -> Float32:
        return score_candidates(
            self._item_vectors_ID,
            self._item_bias_I,
            self._bundle.companion,
            query_D,
            history.indices_H,
            indices_C,
            log_partition_of_query,
        )

    def _weighted(self, query_D: Float32) -> Float32:
        """Returns a query, or several, with the weight that the sequence has in the blend."""
        return np.float32(self._bundle.scoring.sequence) * query_D

    def candidate_logits(self, queries_QD: Float32, indices_C: Int64) -> Float32:
        logits_QC: Float32 = self._weighted(queries_QD) @ self._item_vectors_ID[indices_C].T
        logits_QC += self._item_bias_I[indices_C]
        return logits_QC

    def added_without(self, history: ModelHistory, places_E: Int64, indices_C: Int64) -> Float32:
        if self._folded is not None:
            return self._folded.added_without(history.indices_H, places_E, indices_C)
        return np.stack(
            [
                self._bundle.companion.added_to(history.without(place).indices_H, indices_C)
                for place in places_E.tolist()
            ]
        )

    def _logits_of(self, weighted_D: Float32, indices_C: Int64) -> Float32:
        logits_C: Float32 = self._item_vectors_ID[indices_C] @ weighted_D
        logits_C += self._item_bias_I[indices_C]
        return logits_C

    def indices_of(self, rows: npt.NDArray[np.int32]) -> Int64:
        indices = np.full(len(rows), -1, dtype=np.int64)
        within = rows < len(self._indices_R)
        indices[within] = self._indices_R[rows[within]]
        return indices

    def cosines(self, index: int) -> Float32:
        unit_D = self._item_vectors_ID[index] * self._inverse_norms_I[index]
        return (self._item_vectors_ID @ unit_D) * self._inverse_norms_I

    def unit_vectors(self, indices: Int64) -> Float32:
        # Index -1 reads the last item, and is blanked.
        if self._unit_vectors_ID is not None:
            vectors_CD = self._unit_vectors_ID[indices]
        else:
            vectors_CD = self._item_vectors_ID[indices] * self._inverse_norms_I[indices][:, None]
        if indices.min(initial=0) < 0:
            vectors_CD[indices < 0] = 0
        return vectors_CD

    def vectors(self, indices: Int64) -> Float32:
        return self._item_vectors_ID[indices]

    def similarities(self, portrait_D: Float32, moment_D: Float32, alpha: float) -> Float32:
        return cosine_similarities(portrait_D, moment_D, self._item_vectors_ID, self._inverse_norms_I, alpha)

    def read_history(self, history: History) -> ModelHistory:
        read: ModelHistory = history.derived("read", self._token, lambda: self._read(history))
        return read

    def _read(self, history: History) -> ModelHistory:
        indices_N = self.indices_of(history.rows_N)
        everybody_N = np.zeros(len(history), dtype=np.int32)
        places = np.flatnonzero(mark_clean_events(everybody_N, indices_N, history.kinds_N))
        return ModelHistory(indices_N[places], history.kinds_N[places], places)

    def encode(self, history: ModelHistory) -> Float32:
        read = BundleHistory(history.indices_H, history.kinds_H)
        return self._bundle.encoder.encode(*encoder_inputs(read, self._item_vectors_ID, self.max_history))

    def logits(self, query_D: Float32) -> Float32:
        # `dot` and not `@`, which takes half as long again for a matrix and a vector.
        logits_I: Float32 = np.dot(self._item_vectors_ID, self._weighted(query_D))
        logits_I += self._item_bias_I
        return logits_I

    def cooccurrence(self, history: ModelHistory) -> Float32:
        return cooccurrence_scores(self._matrix, history.indices_H, self._bundle.scoring)

    def cooccurrence_contributions(self, history: ModelHistory, indices_C: Int64) -> Float32:
        return cooccurrence_contributions(self._matrix, history.indices_H, indices_C, self._bundle.scoring)

    def companion(self, history: ModelHistory) -> CompanionScores:
        companion = self._bundle.companion
        if self._folded is not None:
            forward_I, counted_I = self._folded.counts(history.indices_H)
            return CompanionScores(forward_I, counted_I, companion.content(history.indices_H))
        forward_I = self.cooccurrence(history)
        counted_I = companion.counted(history.indices_H, forward_I)
        return CompanionScores(forward_I, counted_I, companion.content(history.indices_H))

    def counted_losses(self, history: ModelHistory, indices_C: Int64) -> Float32:
        companion = self._bundle.companion if self._folded is None else self._folded
        return companion.losses(history.indices_H, indices_C)

    def damped(self, c: Float32) -> Float32:
        return np.log1p(np.float32(self._bundle.scoring.scale) * c)

    def blend(self, logits_I: Float32, companion: CompanionScores) -> Float32:
        # As `logits_I - log_partition(logits_I)`, with the pass for the largest used twice.
        score_I: Float32 = logits_I - logits_I.max()
        score_I -= np.log(np.exp(score_I).sum())
        score_I += companion.counted_I
        if companion.content_I is not None:
            score_I += companion.content_I
        return score_I


def _inverse_norms(vectors_ID: Float32) -> Float32:
    """Returns 1 / ‖v‖ of every row, (I,), float32; 0 for a row of zeros."""
    norms_I = np.empty(len(vectors_ID), np.float32)
    # In pieces: the squares of ten million vectors would be a second copy of them, 2.6 GB for a moment.
    for start in range(0, len(vectors_ID), _PIECE):
        piece = slice(start, start + _PIECE)
        norms_I[piece] = np.linalg.norm(vectors_ID[piece], axis=1)
    return np.where(norms_I > 0, 1 / np.maximum(norms_I, 1e-12), 0).astype(np.float32)


def _outcome_weights(bundle: Bundle) -> tuple[float, float, float]:
    described = bundle.manifest.get("ranker") if bundle.ranker is not None else None
    weights = described.get("weights", {}) if isinstance(described, dict) else {}
    click, cart, purchase = (float(weights.get(task, 1.0)) for task in TASKS)
    return click, cart, purchase


class ModelWatcher:
    """Follows an alias of the registry; implements `ports.ModelSource`.

    The new version is loaded, verified and warmed beside the old one; then one reference is
    replaced. A request that has begun keeps the model that it began with.

    Args:
        on_loaded: called with a model just before it comes into service.
        on_refused: called with every refusal, for metrics.
        most_exact: items up to which all are scored; larger catalogues are searched.
    """

    def __init__(
        self,
        registry: Path,
        public_key: Ed25519PublicKey,
        index: ItemIndex,
        *,
        model: str = "main",
        alias: str = PRODUCTION,
        poll_seconds: float = 0.2,
        most_exact: int = MOST_EXACT,
        on_loaded: Callable[[BundleModel], None] = lambda _: None,
        on_refused: Callable[[Refusal], None] = lambda _: None,
    ) -> None:
        self._registry = Registry(registry)
        self._alias_file = registry / model / "aliases" / f"{alias}.json"
        self._public_key = public_key
        self._index = index
        self._model_name = model
        self._alias = alias
        self._poll_seconds = poll_seconds
        self._most_exact = most_exact
        self._on_loaded = on_loaded
        self._on_refused = on_refused
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="model-watcher", daemon=True)
        self._seen: tuple[int, int, int] | None = None
        self._retry_at: float | None = None
        self._model: BundleModel | None = None
        self._previous: BundleModel | None = None
        self._state = ModelState(model, alias)

    def current(self) -> BundleModel | None:
        return self._model

    def state(self) -> ModelState:
        """Returns what is in service, and what was refused."""
        return self._state

    def start(self) -> None:
        """Looks once, then follows the alias in the background."""
        self.look()
        self._thread.start()

    def start_in_background(self) -> None:
        """Follows the alias; the first look is taken in the background too."""
        self._thread.start()

    def stop_soon(self) -> None:
        """Ends the following, without waiting for it."""
        self._stop.set()

    def stop(self) -> None:
        """Ends the following."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def look(self) -> None:
        """Puts the alias's version into service where it is another one, and fits."""
        stamp = self._stamp()
        retry = self._retry_at is not None and time.monotonic() >= self._retry_at
        if stamp == self._seen and not retry:
            return
        self._seen, self._retry_at = stamp, None
        if stamp is None:
            return
        version = ""
        try:
            alias = self._registry.alias(self._model_name, self._alias)
            if alias is None:
                return
            version = alias.version
            if self._state.version == version:
                return
            self._put_into_service(version)
        except ShopkeeperError as error:
            self._refuse(version, error.reason, error.message)
        except Exception as error:
            self._refuse(version, "UNREADABLE", f"{type(error).__name__}: {error}")

    def _run(self) -> None:
        self.look()
        while not self._stop.wait(self._poll_seconds):
            self.look()

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            status = self._alias_file.stat()
        except OSError:
            return None
        return (status.st_mtime_ns, status.st_ino, status.st_size)

    def _put_into_service(self, version: str) -> None:
        began = time.monotonic()
        # A rollback takes effect at once, however long its version took to load: it was verified then, and its
        # arrays have been in memory since.
        model = self._previous
        if model is None or model.version != version:
            bundle = load_bundle(self._registry.version_path(self._model_name, version), self._public_key)
            model = BundleModel(bundle, self._index, most_exact=self._most_exact)
            _warm(model)
        self._on_loaded(model)
        kept = self._model
        self._previous = kept if kept is not None and kept.item_count <= _MOST_KEPT_ITEMS else None
        previous, self._model = self._state.version, model
        self._state = replace(
            self._state,
            version=version,
            created_time=model.created_time,
            item_count=model.item_count,
            dimension=model.dimension,
            max_history=model.max_history,
            loaded_time=time.time(),
            swap_count=self._state.swap_count + 1,
        )
        _LOGGER.info(
            "model in service",
            model=model.name,
            version=version,
            items=model.item_count,
            previous=previous,
            seconds=round(time.monotonic() - began, 3),
        )

    def _refuse(self, version: str, reason: str, text: str) -> None:
        # A version may be on its way to this disk: look again, though the alias does not change.
        self._retry_at = time.monotonic() + _PENDING_RETRY_SECONDS
        old = self._state
        known = any(refusal.version == version and refusal.text == text for refusal in old.refused)
        refusal = Refusal(self._model_name, version, reason, text, time.time())
        others = [r for r in old.refused if r.version != version]
        self._state = replace(old, refused=(refusal, *others)[:_MAX_REFUSED])
        if not known:
            self._on_refused(refusal)
            _LOGGER.error("model refused", version=version, reason=reason, text=text, kept=old.version)


def _warm(model: BundleModel) -> None:
    """Runs every kernel once: the first request shall not pay for page faults.

    Raises:
        ValueError, RuntimeError: the encoder does not run, or its scores are not finite.
    """
    if not model.item_count:
        return
    newest = np.array([0], dtype=np.int64)
    history = ModelHistory(newest, np.array([3], np.int32), np.zeros(1, np.int64))
    scores_I = model.blend(model.logits(model.encode(history)), model.companion(history))
    model.cosines(0)
    if model.is_searched:
        query_D = model.encode(history)
        found_C, partition = model.candidates(query_D, history, 1_000)
        model.score_candidates(query_D, history, found_C, partition)
    if not np.isfinite(scores_I).all():
        raise ValueError("its scores are not finite")


def _timestamp(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return None
