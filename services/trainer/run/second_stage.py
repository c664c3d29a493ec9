"""The second stage of a run: taught on what an earlier version showed, with that version's own scores.

A first stage that trained on a click foretells it better than it could have when the page was made. So the features
are those of a version that is older than every page it is asked about, the newest with enough pages since.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import psycopg

from services.trainer.pipeline.dataset import EventColumns
from services.trainer.pipeline.plan import Plan, TrainedModel
from services.trainer.privacy.training import PrivateModel
from services.trainer.ranker import card
from services.trainer.ranker.build import MIN_CLICKS, MIN_IMPRESSIONS, JudgedRanker, build_ranker
from services.trainer.ranker.examples import make_examples
from services.trainer.ranker.items import item_table
from services.trainer.ranker.responses import Responses, read_responses
from services.trainer.run.work import Work
from shared.bundle import Bundle, Ranker, Registry, load_bundle
from shared.bundle.arrays import encode_arrays
from shared.bundle.ranker import RANKER
from shared.errors import DataLoss

_MOST_IMPRESSIONS = 1_000_000
_MOST_PAGES = 30_000
# Pages times items that are scored: half a minute.
_MOST_CELLS = 1_000_000_000
_VERSIONS_LOOKED_AT = 5
_WHY_NOT_PRIVATELY = (
    "a private run teaches none, since what people answered to what they were shown would be told once more, and would "
    "have to be charged to the budget"
)


def add_second_stage(
    work: Work,
    registry: Registry,
    trained: TrainedModel,
    events: EventColumns,
    attributes_of: Mapping[str, Sequence[str]],
    plan: Plan,
    public_key: Any,
) -> None:
    """Puts a ranker into what will be published where one is better than none; says in manifest and card why not.

    Raises:
        Cancelled: the run was told to stop.
    """
    work.report("EVALUATING", "Second stage: reading what was shown.")
    judged, price_of = _judged(work, registry, events, attributes_of, plan, public_key)
    described = judged.describe()
    if judged.served and judged.weights is not None:
        table = item_table(events, attributes_of, price_of, list(trained.vocabulary))
        ranker = Ranker(judged.weights, table)
        trained.attachments[RANKER] = encode_arrays(ranker.to_arrays())
        described["milliseconds_per_500"] = _milliseconds(ranker)
    simulated = card.is_simulated(trained.attachments["card.md"])
    if judged.weights is not None:
        trained.attachments[card.CHART] = card.draw_reliability(judged, "SIMULATION" if simulated else "")
    trained.attachments["card.md"] = card.with_section(trained.attachments["card.md"], judged)
    trained.manifest_fields["ranker"] = described
    words = f"leads by {judged.lead.value:+.4f} a page" if judged.served else f"none, {judged.why_not}"
    work.report("EVALUATING", f"Second stage: {words}.")


def say_why_none(trained: PrivateModel) -> None:
    """Says in manifest and card why a private version has no ranker."""
    judged = JudgedRanker(None, False, _WHY_NOT_PRIVATELY)
    trained.attachments["card.md"] = card.with_section(trained.attachments["card.md"], judged)
    trained.manifest_fields["ranker"] = judged.describe()


def _judged(
    work: Work,
    registry: Registry,
    events: EventColumns,
    attributes_of: Mapping[str, Sequence[str]],
    plan: Plan,
    public_key: Any,
) -> tuple[JudgedRanker, Mapping[str, int]]:
    run = work.run
    versions = list(_versions(registry, run.model, run.config.promote_alias, public_key))
    if not versions:
        return JudgedRanker(None, False, "no version was in service whose pages could have been logged"), {}
    try:
        with work.database.dedicated_connection(autocommit=True) as connection:
            responses = read_responses(
                connection,
                datetime.fromtimestamp(min(learned for _, learned in versions) / 1e6).astimezone(),
                work.store.read_watermark(run.run_id),
                _MOST_IMPRESSIONS,
            )
    except (psycopg.Error, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return JudgedRanker(None, False, f"what was shown could not be read ({reason})"), {}
    window = run.config.window
    if window.end_time:
        end = int(datetime.fromisoformat(window.end_time).timestamp() * 1e6)
        responses = responses.where(responses.time_N < end)
    if window.start_time:
        start = int(datetime.fromisoformat(window.start_time).timestamp() * 1e6)
        responses = responses.where(responses.time_N >= start)
    bundle, since = _newest_with_enough(versions, responses)
    table = item_table(events, attributes_of, responses.price_of, list(bundle.item_ids), before=since)
    examples = make_examples(
        responses.later_than(since),
        bundle,
        table,
        exclude_seen=plan.exclude_seen,
        max_pages=min(_MOST_PAGES, _MOST_CELLS // max(bundle.item_count, 1)),
        check=work.check,
    )
    judged = build_ranker(
        examples, run.config.seed, resamples=plan.resamples, confidence=plan.confidence, check=work.check
    )
    return judged, responses.price_of


def _versions(registry: Registry, model: str, alias: str, public_key: Any) -> Iterator[tuple[Bundle, int]]:
    """Yields versions that served, newest first, with the time of their newest event in microseconds."""
    state = registry.alias(model, alias)
    names = [] if state is None else [change.version for change in state.history]
    for name in list(dict.fromkeys(names))[:_VERSIONS_LOOKED_AT]:
        try:
            bundle = load_bundle(registry.version_path(model, name), public_key)
            learned = datetime.fromisoformat(bundle.manifest["data"]["last_event_at"])
        except (DataLoss, KeyError, TypeError, ValueError):
            continue
        yield bundle, int(learned.timestamp() * 1e6)


def _newest_with_enough(versions: Sequence[tuple[Bundle, int]], responses: Responses) -> tuple[Bundle, int]:
    """Returns the newest version since which enough was logged; else that with the most."""
    for bundle, since in versions:
        later = responses.time_N > since
        if later.sum() >= MIN_IMPRESSIONS and responses.labels_NT[later, 0].sum() >= MIN_CLICKS:
            return bundle, since
    return min(versions, key=lambda version: version[1])


def _milliseconds(ranker: Ranker) -> float:
    """Returns the median time of the network for 500 candidates."""
    features_CF = np.tile(ranker.weights.mean_F, (500, 1))
    taken = []
    for _ in range(20):
        began = time.perf_counter()
        ranker.probabilities(features_CF)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken) * 1e3)
