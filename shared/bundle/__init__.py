"""A model version as a directory: where training and serving meet.

registry.py   versions and aliases in a directory
manifest.py   what a version says of itself, and its signature
writer.py     publishes a version, or leaves no trace
reader.py     loads a version, or refuses it
encoder.py    runs the encoder (LiteRT)
history.py    a person's events -> item indices, kinds, mask
scoring.py    indices and a query vector -> scores
ranker.py     the second stage: features of shown candidates -> what a shopper will do
ranker_features.py   scores, a history and a table of items -> features
"""

from __future__ import annotations

from shared.bundle.encoder import LiteRtEncoder
from shared.bundle.history import (
    INTEREST_KINDS,
    History,
    encoder_inputs,
    history_from_events,
    mark_clean_events,
)
from shared.bundle.manifest import ScoringParameters
from shared.bundle.ranker import Ranker
from shared.bundle.reader import Bundle, load_bundle
from shared.bundle.registry import AliasChange, AliasState, Registry
from shared.bundle.scoring import (
    Companion,
    CooccurrenceMatrix,
    blended_scores,
    cooccurrence_contributions,
    cooccurrence_neighbours,
    cooccurrence_scores,
    log_partition,
    score_candidates,
)
from shared.bundle.writer import write_bundle

__all__ = [
    "INTEREST_KINDS",
    "AliasChange",
    "AliasState",
    "Bundle",
    "Companion",
    "CooccurrenceMatrix",
    "History",
    "LiteRtEncoder",
    "Ranker",
    "Registry",
    "ScoringParameters",
    "blended_scores",
    "cooccurrence_contributions",
    "cooccurrence_neighbours",
    "cooccurrence_scores",
    "encoder_inputs",
    "history_from_events",
    "load_bundle",
    "log_partition",
    "mark_clean_events",
    "score_candidates",
    "write_bundle",
]
