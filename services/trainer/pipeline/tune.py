"""The search for hyper-parameters: Optuna asks, a short training answers, by validation events alone.

Tree-structured Parzen estimator (Bergstra et al., 2011); a trial that is worse at its pass than the median of the
others is cut short. The size itself is always the first trial, so that a search never ends below it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import optuna

from services.trainer.domain.hyper_parameters import RANGES, HyperParameters
from services.trainer.domain.runs import Trial
from services.trainer.pipeline.blend import FeatureMaker, Terms, learn_blend
from services.trainer.pipeline.budget import Budget
from services.trainer.pipeline.cooccurrence import PairCounts
from services.trainer.pipeline.dataset import (
    EventColumns,
    HeldOut,
    Histories,
    ItemAttributes,
    clean,
    encode_attributes,
    require_enough,
)
from services.trainer.pipeline.evaluation import (
    choose_half_life,
    ndcg_at_10,
    popularity,
    rank_by_query,
    sample_rows,
)
from services.trainer.pipeline.plan import Plan, split_of

_STARTUP_TRIALS = 4
_VALIDATION_USERS = 3_000


def space_around(size: HyperParameters) -> dict[str, optuna.distributions.BaseDistribution]:
    """Returns what is searched, and where."""

    def around(value: float, reach: float, name: str) -> tuple[float, float]:
        low, high = RANGES[name]
        return max(low, value - reach), min(high, value + reach)

    floats, choices = optuna.distributions.FloatDistribution, optuna.distributions.CategoricalDistribution
    widths = tuple(
        width
        for width in (size.dimension // 2, size.dimension, 2 * size.dimension)
        if RANGES["dimension"][0] <= width <= RANGES["dimension"][1] and width % (2 * size.heads) == 0
    )
    return {
        "learning_rate": floats(size.learning_rate / 4, min(1.0, size.learning_rate * 4), log=True),
        "dropout": floats(*around(size.dropout, 0.3, "dropout")),
        "filter_share": floats(*around(size.filter_share, 0.3, "filter_share")),
        "dimension": choices(widths),
    }


class Search:
    """What to try next.

    Args:
        size: around which to search.
        known: trials made before; those outside of the space are left out.
    """

    def __init__(self, size: HyperParameters, known: Sequence[Trial], *, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space_around(size)
        # The trials of another attempt are part of the seed: a resumed search must not repeat its draws.
        self._study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=seed + len(known), n_startup_trials=_STARTUP_TRIALS),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP_TRIALS, n_warmup_steps=2),
        )
        for trial in known:
            with contextlib.suppress(ValueError):
                self._study.add_trial(
                    optuna.trial.create_trial(
                        params=dict(trial.overrides),
                        distributions=self._space,
                        value=trial.validation_ndcg_at_10,
                    )
                )
        if not self._study.trials:
            self._study.enqueue_trial({name: getattr(size, name) for name in self._space})
        self._asked: optuna.Trial | None = None
        self._epochs = 0

    @property
    def best(self) -> float:
        """The best NDCG@10 so far; 0 before the first trial."""
        return float(self._study.best_value) if self._study.trials else 0.0

    @property
    def trial_count(self) -> int:
        """Trials known."""
        return len(self._study.trials)

    def ask(self) -> dict[str, float | int]:
        """Returns the departures from the size to try."""
        self._asked = self._study.ask(self._space)
        self._epochs = 0
        return dict(self._asked.params)

    def is_hopeless(self, quality: float) -> bool:
        """Hears the quality after a pass; returns whether to give the trial up."""
        if self._asked is None:
            return False
        self._epochs += 1
        self._asked.report(quality, self._epochs)
        return self._asked.should_prune()

    def tell(self, trial: Trial) -> None:
        """Hears how the trial that was asked for ended."""
        if self._asked is not None:
            self._study.tell(self._asked, trial.validation_ndcg_at_10)
            self._asked = None


@dataclass(frozen=True, slots=True, eq=False)
class TuningData:
    """Everything that is the same for all trials."""

    histories: Histories
    training: Histories
    validation: HeldOut
    attributes: ItemAttributes
    terms: Terms
    popularity_I: npt.NDArray[np.float32]
    size: HyperParameters
    exclude_seen: bool
    seed: int

    @classmethod
    def of(
        cls,
        events: EventColumns,
        attributes_of: Mapping[str, Sequence[str]],
        size: HyperParameters,
        plan: Plan,
        *,
        seed: int,
        report: Callable[..., None],
    ) -> TuningData:
        """Cleans, splits and counts; raises FailedPrecondition: TOO_LITTLE_DATA."""
        report("PREPARING", f"Cleaning {len(events):,} events.")
        histories = clean(events, plan.cleaning)
        require_enough(histories)
        split = split_of(histories, plan)
        training = histories.first(split.training_U)
        validation = split.validation.take(sample_rows(len(split.validation), _VALIDATION_USERS, seed))
        counts = PairCounts(histories.item_count, size.cooccurrence_window, len(histories.item_E))
        counts.add(histories, 0, split.training_U)
        half_life_days = choose_half_life(histories, validation, training, plan.exclude_seen)
        attributes = encode_attributes(histories.item_ids, attributes_of)
        terms = Terms.of(counts, attributes, popularity(training, half_life_days))
        return cls(
            histories, training, validation, attributes, terms, popularity(training), size, plan.exclude_seen, seed
        )  # fmt: skip

    def quality(
        self,
        overrides: Mapping[str, float | int],
        search: Search,
        seconds: float,
        should_stop: Callable[[], bool],
    ) -> float:
        """Returns the NDCG@10 of the blend on the validation events after a training with these departures."""
        from services.trainer.pipeline.sequence_model import SequenceModel
        from services.trainer.pipeline.training import train

        size = replace(self.size, **overrides)  # type: ignore[arg-type]
        model = SequenceModel(self.histories.item_count, self.attributes, size, self.seed)
        budget = Budget(max(1.0, min(seconds, size.max_train_seconds)), 0)
        hopeless = False

        def validate() -> float:
            nonlocal hopeless
            query_BD = model.encode(self.histories, self.validation)
            rank_B = rank_by_query(
                self.histories, self.validation, query_BD, model.item_vectors(), self.exclude_seen
            )
            quality = float(ndcg_at_10(rank_B).mean())
            hopeless = search.is_hopeless(quality)
            return quality

        budget.resume()
        train(model, self.training, validate, lambda _: None, budget, lambda: should_stop() or hopeless)
        budget.pause()
        blend = learn_blend(
            self.histories, self.validation, lambda people: model.encode(self.histories, people),
            FeatureMaker(model.item_vectors(), self.terms), self.popularity_I, self.exclude_seen, self.seed,
        )  # fmt: skip
        # Each person is judged by weights that others taught.
        return blend.ndcg[blend.served]
