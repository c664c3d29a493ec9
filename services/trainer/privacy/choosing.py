"""How much likeness by the catalogue weighs, chosen on people of their own, privately. NumPy and SciPy.

In one shop people stay with a brand, in another a brand says nothing: no constant fits both. Each person's secret coin
puts them into training, or here, or among those who are measured on, so that each of the three may spend all of
epsilon (parallel composition). A person here adds

    ( ndcg@10 of their last event under each weight of the grid ),  each in [0, 1]

to a sum with Gaussian noise; its L2 norm is at most the root of the grid's length. The largest noisy sum wins.

Where people are many a part of them suffices. Its rate is computed from the noisy counts, which are known already; each
takes part by a coin of their own.

B = people, I = items, W = weights.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from services.trainer.pipeline.batch_companion import BatchCompanion, recency_weights
from services.trainer.pipeline.dataset import Histories, hold_out
from services.trainer.pipeline.evaluation import Contestants, chunks, ndcg_at_10
from services.trainer.privacy.contributions import take_people
from services.trainer.privacy.randomness import SecureRandom
from shared.ranking_metrics import rank_of_target

Float64 = npt.NDArray[np.float64]

# Public constants. In a draw the first wins: no likeness where nothing speaks for it.
WEIGHTS = (0.0, 1.0, 3.0, 10.0)
SENSITIVITY = float(np.sqrt(len(WEIGHTS)))
CHOICE_SHARE = 0.1
_ENOUGH_PEOPLE = 5_000


def choose_weight(
    people: Histories,
    contestants: Contestants,
    exclude_seen: bool,
    noise_multiplier: float,
    random: SecureRandom,
) -> float:
    """Returns the weight of likeness that the noisy sums favour.

    Args:
        people: who choose; training never read them.
        contestants: what would serve, with likeness at a weight of 1.
        noise_multiplier: 0, for comparisons alone, adds none.
    """
    # The popularities count everybody once or more: so many people choose at the most, in expectation.
    about = float(contestants.popularity_I.sum()) * CHOICE_SHARE
    coin_U = random.coins(people.user_count, min(1.0, _ENOUGH_PEOPLE / max(about, 1.0)))
    chosen = take_people(people, np.flatnonzero(coin_U))
    sum_W = numbers_of(chosen, contestants, exclude_seen).sum(axis=0)
    return WEIGHTS[int(np.argmax(sum_W + noise_multiplier * SENSITIVITY * random.normal(len(WEIGHTS))))]


def numbers_of(people: Histories, contestants: Contestants, exclude_seen: bool) -> Float64:
    """Returns what each person who has an event to foretell adds, (B, W), every number in [0, 1]."""
    held_out = hold_out(people, 1, exclude_seen)
    served = contestants.companion
    batch = BatchCompanion(replace(served, attribute_queries_IR=None, attribute_keys_IR=None))
    found_BW = np.zeros((len(held_out), len(WEIGHTS)))
    for rows, part, seen, excluded_BI in chunks(people, held_out, exclude_seen):
        score_BI = contestants.item_bias_I + batch.added(seen, batch.forward(seen))
        likeness_BI = np.zeros_like(score_BI)
        if served.attribute_queries_IR is not None and served.attribute_keys_IR is not None:
            mean_BI = recency_weights(seen, people.item_count, served.scoring, mean=True)
            liked_BR = np.asarray(mean_BI @ served.attribute_queries_IR, np.float32)
            likeness_BI = liked_BR @ served.attribute_keys_IR.T
        for column, weight in enumerate(WEIGHTS):
            rank_B = rank_of_target(score_BI + np.float32(weight) * likeness_BI, part.target_B, excluded_BI)
            found_BW[rows, column] = ndcg_at_10(rank_B)
    return np.clip(found_BW, 0.0, 1.0)
