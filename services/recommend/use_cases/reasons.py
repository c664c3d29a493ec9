"""Why an item is recommended, true of how its score came about.

Of a blended score, co-occurrence is the reason where taking its strongest event
away would lower the score by MATERIAL_NATS or more. Otherwise the sequence model
is, and its event is found by leave-one-out occlusion: each of the last events is
left out in turn, the history encoded anew, and the one whose absence lowers the
item's score most is named.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from services.recommend.domain.history import History
from services.recommend.domain.recommendation import Reason, ReasonKind, Source
from services.recommend.ports import Float32, Model, ModelHistory
from services.recommend.use_cases.scoring import SIMILAR_COOCCURRENCE_WEIGHT, Scores
from services.recommend.use_cases.world import World
from shared.event_kinds import EventKind

MATERIAL_NATS = 0.25
OCCLUDED_EVENTS = 5

_REASON_OF_KIND = {
    EventKind.ITEM_VIEW: (ReasonKind.BECAUSE_YOU_VIEWED, "Because you looked at {title}"),
    EventKind.RECOMMENDATION_CLICK: (ReasonKind.BECAUSE_YOU_VIEWED, "Because you looked at {title}"),
    EventKind.PURCHASE: (ReasonKind.BECAUSE_YOU_BOUGHT, "Because you bought {title}"),
    EventKind.ADD_TO_CART: (ReasonKind.BECAUSE_YOU_SAVED, "Because {title} is in your cart"),
    EventKind.WISH_LIST: (ReasonKind.BECAUSE_YOU_SAVED, "Because {title} is on your wish-list"),
    EventKind.RATING: (ReasonKind.BECAUSE_YOU_SAVED, "Because you rated {title}"),
    EventKind.REVIEW: (ReasonKind.BECAUSE_YOU_SAVED, "Because you reviewed {title}"),
    EventKind.SHARE: (ReasonKind.BECAUSE_YOU_SAVED, "Because you shared {title}"),
}


def reasons_for(
    world: World,
    scores: Scores,
    history: History,
    rows_K: npt.NDArray[np.int32],
    sources_K: Sequence[Source],
    values_K: Float32,
) -> list[list[Reason]]:
    """Returns the reasons of each item, the strongest first; empty where none is known.

    Args:
        sources_K: the tier that each item came from.
        values_K: the value by which its tier ranked it: a count, for popular ones.
    """
    found: list[list[Reason]] = [[] for _ in range(len(rows_K))]
    personal: list[int] = []
    for k, source in enumerate(sources_K):
        value = float(values_K[k])
        match source:
            case Source.POPULAR:
                if value > 0:
                    found[k] = [Reason(ReasonKind.POPULAR, "Popular in the shop", contribution=value)]
            case Source.POPULAR_IN_SEGMENT:
                found[k] = _popular_in_segment(scores, int(rows_K[k]), value)
            case Source.TRENDING:
                found[k] = [Reason(ReasonKind.TRENDING, "Trending now", contribution=value)]
            case Source.NEW_ITEMS:
                found[k] = [Reason(ReasonKind.NEW_ITEM, "New in the shop")]
            case Source.COSINE:
                found[k] = [Reason(ReasonKind.SEQUENCE, "Suits what you did lately", contribution=value)]
            case Source.RULE:
                # Nothing but the rule, which its own reason names.
                pass
            case Source.BUY_AGAIN:
                found[k] = [_buy_again(world, history, int(rows_K[k]))]
            case Source.SEQUENCE if scores.parts:
                found[k] = [Reason(ReasonKind.SEQUENCE, "Suits what you did lately", contribution=value)]
            case Source.CONTENT if scores.parts:
                # Of several events together: naming one would be untrue.
                found[k] = [
                    Reason(ReasonKind.SIMILAR_TO, "Resembles what you looked at lately", contribution=value)
                ]
            case Source.CONTENT if scores.resembled_row >= 0 and not _is_learnt(world, int(rows_K[k])):
                found[k] = [_resembles(world, scores.resembled_row, value)]
            case Source.CONTENT if scores.sources == [Source.CONTENT]:
                found[k] = [_resembles(world, scores.resembled_row, value)]
            case _:
                personal.append(k)
    if personal and world.model is not None:
        rows_C = rows_K[personal]
        indices_C = world.model.indices_of(rows_C)
        if scores.parts:
            made = _counted_reasons(world, world.model, history, indices_C, values_K[personal])
        elif scores.model_history is not None:
            made = _blend_reasons(world, world.model, scores, history, scores.model_history, indices_C)
        else:
            made = _item_to_item_reasons(world, world.model, scores, indices_C)
        for k, reasons in zip(personal, made, strict=True):
            found[k] = reasons
    return found


def _is_learnt(world: World, row: int) -> bool:
    return world.model is not None and int(world.model.indices_of(np.array([row], np.int32))[0]) >= 0


def _resembles(world: World, row: int, cosine: float) -> Reason:
    title, item_id = world.catalog.title_of(row), world.index.id_of(row)
    return Reason(ReasonKind.SIMILAR_TO, f"Resembles {title}", item_id, contribution=cosine)


_WHO_IS_OF_STAGE = {
    "stage:prospect": "newcomers",
    "stage:new": "new customers",
    "stage:active": "active customers",
    "stage:loyal": "loyal customers",
    "stage:lapsing": "customers who come back seldom",
    "stage:lost": "customers who come back after long",
}


def _popular_in_segment(scores: Scores, row: int, value: float) -> list[Reason]:
    """Returns where most of the value comes from: the segment, or the shop whose popularity is its prior."""
    counted = value if scores.in_segment_R is None else float(scores.in_segment_R[row])
    reasons = []
    if counted > 0:
        who = _WHO_IS_OF_STAGE.get(scores.segment, scores.segment)
        reasons.append(
            Reason(
                ReasonKind.POPULAR_IN_SEGMENT,
                f"Popular with {who}" if scores.segment in _WHO_IS_OF_STAGE else f"Popular in {who}",
                contribution=counted,
                segment_id=scores.segment,
            )
        )
    if value - counted > 0:
        reasons.append(Reason(ReasonKind.POPULAR, "Popular in the shop", contribution=value - counted))
    return sorted(reasons, key=lambda reason: -reason.contribution)


def _blend_reasons(
    world: World,
    model: Model,
    scores: Scores,
    history: History,
    read: ModelHistory,
    indices_C: npt.NDArray[np.int64],
) -> list[list[Reason]]:
    lost_CH = model.counted_losses(read, indices_C)
    strongest_C = lost_CH.argmax(axis=1)
    lost_C = lost_CH[np.arange(len(indices_C)), strongest_C]
    material_C = lost_C >= MATERIAL_NATS
    reasons: list[list[Reason]] = [[] for _ in range(len(indices_C))]
    for c in np.flatnonzero(material_C):
        place = int(strongest_C[c])
        kind = EventKind(int(read.kinds_H[place]))
        reason_kind, wording = _REASON_OF_KIND[kind]
        reasons[c] = [_about(world, history, read, place, reason_kind, wording, float(lost_C[c]))]
    rest = np.flatnonzero(~material_C)
    if len(rest) and scores.query_D is not None:
        drops_EC, places = _occlude(model, read, scores, indices_C[rest])
        for c, drop_E in zip(rest, drops_EC.T, strict=True):
            e = int(drop_E.argmax())
            if drop_E[e] > 0:
                wording = "Follows from what you did lately, most of all from {title}"
                reasons[c] = [
                    _about(world, history, read, places[e], ReasonKind.SEQUENCE, wording, float(drop_E[e]))
                ]
            else:
                # No single event carries it: naming one would be untrue.
                reasons[c] = [Reason(ReasonKind.SEQUENCE, "Suits what you did lately")]
    return reasons


def _counted_reasons(
    world: World, model: Model, history: History, indices_C: npt.NDArray[np.int64], values_C: Float32
) -> list[list[Reason]]:
    """Returns the event that most of each item's co-occurrence comes from."""
    read = model.read_history(history)
    contributions_CH = model.cooccurrence_contributions(read, indices_C)
    made = []
    for contributions_H, value in zip(contributions_CH, values_C.tolist(), strict=True):
        place = int(contributions_H.argmax())
        kind, wording = _REASON_OF_KIND[EventKind(int(read.kinds_H[place]))]
        made.append([_about(world, history, read, place, kind, wording, value)])
    return made


def _occlude(
    model: Model, read: ModelHistory, scores: Scores, indices_C: npt.NDArray[np.int64]
) -> tuple[Float32, list[int]]:
    """Returns by how much each item's score falls without each of the last events, (E, C), and their places."""
    assert scores.query_D is not None
    places = list(range(max(0, len(read) - OCCLUDED_EVENTS), len(read)))
    # Without any event the query is zero, and what is left is the items' bias.
    nothing_D = np.zeros(model.dimension, np.float32)
    shorter = [read.without(place) for place in places]
    queries_QD = np.stack(
        [scores.query_D, *(model.encode(rest) if len(rest) else nothing_D for rest in shorter)]
    )
    partition_Q = model.log_partitions(queries_QD)
    whole_C = model.score_candidates(scores.query_D, read, indices_C, float(partition_Q[0]))
    without_EC = model.candidate_logits(queries_QD[1:], indices_C) - partition_Q[1:, None]
    without_EC += model.added_without(read, np.array(places), indices_C)
    return whole_C - without_EC, places


def _item_to_item_reasons(
    world: World, model: Model, scores: Scores, indices_C: npt.NDArray[np.int64]
) -> list[list[Reason]]:
    seeds = scores.seed_indices
    if not len(seeds):
        return [[] for _ in indices_C]
    contributions_CS = np.stack(
        [
            model.cooccurrence_contributions(
                ModelHistory(seeds[s : s + 1], np.zeros(1, np.int32), np.zeros(1, np.int64)), indices_C
            )[:, 0]
            for s in range(len(seeds))
        ],
        axis=1,
    )
    reasons: list[list[Reason]] = []
    content = Source.CONTENT in scores.sources
    for c in range(len(indices_C)):
        strongest = int(contributions_CS[c].argmax())
        row = int(model.rows_I[seeds[strongest]])
        title, seed_id = world.catalog.title_of(row), world.index.id_of(row)
        together = float(contributions_CS[c, strongest])
        made: list[Reason] = []
        if together > 0:
            amount = together
            if content:
                amount = SIMILAR_COOCCURRENCE_WEIGHT * float(
                    model.damped(np.array([together], np.float32))[0]
                )
            made.append(
                Reason(
                    ReasonKind.BOUGHT_TOGETHER, f"Chosen together with {title}", seed_id, contribution=amount
                )
            )
        if content:
            cosine = float(model.cosines(int(seeds[0]))[indices_C[c]])
            made.append(Reason(ReasonKind.SIMILAR_TO, f"Resembles {title}", seed_id, contribution=cosine))
        reasons.append(sorted(made, key=lambda reason: -reason.contribution))
    return reasons


def _about(
    world: World,
    history: History,
    read: ModelHistory,
    place: int,
    kind: ReasonKind,
    wording: str,
    contribution: float,
) -> Reason:
    n = int(read.places_H[place])
    row = int(history.rows_N[n])
    return Reason(
        kind,
        wording.format(title=world.catalog.title_of(row)),
        world.index.id_of(row),
        int(history.kinds_N[n]),
        float(history.times_N[n]),
        contribution,
    )


def _buy_again(world: World, history: History, row: int) -> Reason:
    bought = np.flatnonzero((history.rows_N == row) & (history.kinds_N == EventKind.PURCHASE))
    title = world.catalog.title_of(row)
    return Reason(
        ReasonKind.BUY_AGAIN,
        f"You have bought {title} before"
        if len(bought) == 1
        else f"You have bought {title} {len(bought)} times",
        world.index.id_of(row),
        int(EventKind.PURCHASE),
        float(history.times_N[bought[-1]]),
        float(len(bought)),
    )
