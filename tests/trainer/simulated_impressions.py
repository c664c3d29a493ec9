"""SIMULATION: a first stage, pages in its order, and the responses that a log would hold of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.trainer.pipeline.dataset import EventColumns
from services.trainer.ranker.examples import Examples, make_examples
from services.trainer.ranker.first_stage import first_stage, unit_vectors
from services.trainer.ranker.items import item_table
from services.trainer.ranker.responses import Responses
from shared.bundle import Bundle, Registry, ScoringParameters, load_bundle, write_bundle
from shared.bundle.history import History, mark_clean_events
from shared.bundle.sum_encoder import build_sum_encoder
from shared.event_kinds import INTEREST_KINDS, EventKind
from shared.simulation.history import DAY_US, Scale, World, make_history
from shared.simulation.impressions import ImpressionLog, make_impressions

KEY = Ed25519PrivateKey.generate()
DIMENSION, LENGTH = 16, 20


@dataclass(frozen=True)
class SimulatedShop:
    """A world that went on for a while, and what is known of it."""

    world: World
    bundle: Bundle
    log: ImpressionLog
    events: EventColumns
    attributes_of: dict[str, list[str]]
    price_of: dict[str, int]
    responses: Responses
    examples: Examples
    appeal_N: np.ndarray
    """The truth of each example: the chance of a click were it looked at."""


def simulated_shop(
    scale: Scale, visits: int, *, position_decay: float, noise: float, max_pages: int = 10**9
) -> SimulatedShop:
    """Returns a shop whose recommender counts what follows what, after so many visits."""
    world, batch = make_history(scale)
    start_us = scale.end_us - scale.days * DAY_US
    offsets = np.asarray(batch.offsets)
    line_E = np.repeat(np.arange(len(batch.kinds)), np.diff(offsets))
    kind_E = np.asarray(batch.kinds)[line_E].astype(np.int64)
    keep = np.isin(kind_E, [int(k) for k in INTEREST_KINDS])
    who_E = np.array([int(u.split("-")[1]) for u in batch.user_ids])[line_E][keep]
    item_E = np.array([int(i.split("-")[1]) for i in batch.item_ids])[keep]
    day_E = (np.asarray(batch.occurred_at_us)[line_E][keep] - start_us) / DAY_US
    kind_E = kind_E[keep]
    people = ~world.crowd.is_bot[who_E]
    who_E, item_E, kind_E, day_E = who_E[people], item_E[people], kind_E[people], day_E[people]
    ids = list(world.shop.item_ids)
    events = EventColumns(
        user_E=who_E, item_E=item_E.astype(np.int32), kind_E=kind_E.astype(np.int32),
        time_E=start_us + (day_E * DAY_US).astype(np.int64), order_E=np.zeros(len(who_E), np.int64), item_ids=ids,
    )  # fmt: skip
    bundle = _bundle(who_E, item_E, day_E, ids)
    log = make_impressions(
        world, (who_E, kind_E, item_E, day_E), _scorer(bundle), visits,
        position_decay=position_decay, noise=noise,
    )  # fmt: skip
    attributes_of = {
        item_id: [
            f"category:{world.shop.category_names[world.shop.category[i]]}",
            f"brand:{world.shop.brand_names[world.shop.brand[i]]}",
        ]
        for i, item_id in enumerate(ids)
    }
    price_of = dict(zip(ids, world.shop.price_micros.tolist(), strict=True))
    responses = responses_of(log, ids, start_us, price_of)
    table = item_table(events, attributes_of, price_of, ids)
    examples = make_examples(responses, bundle, table, exclude_seen=True, max_pages=max_pages)
    width = log.items_PK.shape[1]
    appeal_N = log.appeal_PK[examples.page_N, examples.position_N - 1]
    assert width >= int(examples.position_N.max())
    return SimulatedShop(world, bundle, log, events, attributes_of, price_of, responses, examples, appeal_N)


def responses_of(log: ImpressionLog, ids: list[str], start_us: int, price_of: dict[str, int]) -> Responses:
    """Returns the responses that a log would hold of the pages."""
    pages, width = log.items_PK.shape
    outcome = np.stack([log.clicked_PK, log.carted_PK, log.bought_PK], axis=2).reshape(-1, 3)
    return Responses(
        page_N=np.repeat(np.arange(pages), width),
        user_N=np.repeat(log.who_P, width),
        item_N=log.items_PK.ravel(),
        position_N=np.tile(np.arange(1, width + 1), pages),
        propensity_N=np.ones(pages * width),
        time_N=np.repeat(start_us + (log.day_P * DAY_US).astype(np.int64), width),
        labels_NT=outcome,
        event_user_E=log.event_who_E,
        event_item_E=log.event_item_E,
        event_kind_E=log.event_kind_E,
        event_time_E=start_us + (log.event_day_E * DAY_US).astype(np.int64),
        item_ids=ids,
        price_of=price_of,
    )


def _scorer(bundle: Bundle) -> Callable[..., np.ndarray]:
    unit_ID = unit_vectors(bundle)

    def score(_row: int, item_N: np.ndarray, kind_N: np.ndarray, _day: np.ndarray) -> np.ndarray:
        known = np.flatnonzero(mark_clean_events(np.zeros(len(item_N), np.int32), item_N, kind_N))
        if not len(known):
            return np.log(bundle.popularity + 1e-3)
        history = History(item_N[known].astype(np.int64), kind_N[known].astype(np.int32))
        found = first_stage(bundle, unit_ID, history).score_I.copy()
        found[history.indices_H] -= 3
        return found

    return score


def _bundle(who_E: np.ndarray, item_E: np.ndarray, day_E: np.ndarray, ids: list[str]) -> Bundle:
    """Counts what follows what within five events."""
    count = len(ids)
    order = np.lexsort((day_E, who_E))
    who, item = who_E[order], item_E[order]
    pairs_II = np.zeros((count, count))
    for gap in range(1, 6):
        same = who[gap:] == who[:-gap]
        np.add.at(pairs_II, (item[:-gap][same], item[gap:][same]), 1 / gap)
    np.fill_diagonal(pairs_II, 0)
    weight_II = (pairs_II / np.sqrt(pairs_II.sum(axis=1, keepdims=True) + 1)).astype(np.float32)
    indptr = np.concatenate([[0], np.cumsum((weight_II > 0).sum(axis=1))]).astype(np.int64)
    rows, columns = np.nonzero(weight_II)
    u, s, _ = np.linalg.svd(np.log1p(pairs_II + pairs_II.T))
    vectors = (u[:, :DIMENSION] * np.sqrt(s[:DIMENSION])).astype(np.float32)
    popularity = np.bincount(item_E, minlength=count).astype(np.float32)
    registry = Registry(Path(tempfile.mkdtemp(prefix="simulated-registry-")))
    version = write_bundle(
        registry,
        "main",
        arrays={
            "item_vectors": vectors,
            "item_bias": np.log(popularity + 1).astype(np.float32) * np.float32(0.5),
            "popularity": popularity,
            "cooccurrence_indptr": indptr,
            "cooccurrence_indices": columns.astype(np.int32),
            "cooccurrence_weights": weight_II[rows, columns],
        },
        vocabulary=ids,
        encoder_bytes=build_sum_encoder(LENGTH, DIMENSION),
        manifest_fields={
            "encoder": {"max_history": LENGTH, "dimension": DIMENSION},
            "scoring": ScoringParameters(1.0, scale=30.0, sequence=0.3).to_json(),
        },
        attachments={},
        signing_key=KEY,
    )
    return load_bundle(registry.version_path("main", version), KEY.public_key())


assert EventKind.RECOMMENDATION_CLICK in INTEREST_KINDS
