"""How recommendations are made, as configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from services.recommend.domain.source import SourceWeight


class Scorer(Enum):
    """How a score comes about; named as in the contract."""

    BLENDED = "SCORER_BLENDED"
    POPULARITY = "SCORER_POPULARITY"
    COSINE = "SCORER_COSINE"
    ITEM_TO_ITEM = "SCORER_ITEM_TO_ITEM"
    WEIGHTED_SUM = "SCORER_WEIGHTED_SUM"


class DiversityAlgorithm(Enum):
    """How likeness is paid for; named as in the contract."""

    MMR = "ALGORITHM_MMR"
    DPP = "ALGORITHM_DPP"


@dataclass(frozen=True, slots=True)
class PlacementPolicy:
    """What is particular to one placement.

    Attributes:
        filter_text: joined to the request's own filter with AND; empty is none.
        unseen_first: items that the history shows an interest in come after all others, as they do
            when the model is measured.
    """

    placement: str
    exclude_owned: bool = True
    unseen_first: bool = True
    exclude_in_cart: bool = True
    exclude_out_of_stock: bool = True
    default_page_size: int = 10
    filter_text: str = ""


PLACEMENT_POLICIES: Mapping[str, PlacementPolicy] = {
    policy.placement: policy
    for policy in (
        PlacementPolicy("home"),
        PlacementPolicy("item_page"),
        # Who is about to pay may well take what they looked at before.
        PlacementPolicy("cart", unseen_first=False),
        PlacementPolicy("check_out", unseen_first=False),
        PlacementPolicy("email"),
        # Who searches may search for what they have.
        PlacementPolicy("search", exclude_owned=False, unseen_first=False),
    )
}


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """A way of recommending.

    Attributes:
        diversity_strength: in [0, 1]; 0 is none.
        diversity_depth: how many of the best candidates are reordered.
        sources: of Scorer.WEIGHTED_SUM, each once; other scorers imply theirs.
        cosine_alpha: alpha of Scorer.COSINE.
        exploration_slots: how many slots of a page may explore, in [0, 10].
        exploration_probability: with which each of them does, in [0, 1].
        ranks_again: whether the model's second stage takes part, where it has one.
        ranker_depth: how many of the best candidates it ranks.
        outcome_weights: what a click, a cart addition and a purchase are worth to it; None: as it was judged with.
        rule_ids: the rules that apply, in order.
        model, model_alias: which version serves; "" each for the service's own.
        shadow_model_alias: answers beside it and is compared, never shown; "" is none.
        version: counts the changes, from 1.
        create_time, update_time: seconds since 1970; None for built-in ones.
    """

    serving_config_id: str
    display_name: str
    scorer: Scorer
    diversity_strength: float = 0.0
    diversity_depth: int = 100
    diversity_algorithm: DiversityAlgorithm = DiversityAlgorithm.MMR
    cosine_alpha: float = 0.5
    exploration_slots: int = 0
    exploration_probability: float = 0.0
    ranks_again: bool = True
    ranker_depth: int = 100
    outcome_weights: tuple[float, float, float] | None = None
    rule_ids: tuple[str, ...] = ()
    sources: tuple[SourceWeight, ...] = ()
    model: str = ""
    model_alias: str = ""
    shadow_model_alias: str = ""
    built_in: bool = True
    version: int = 1
    etag: str = ""
    create_time: float | None = None
    update_time: float | None = None
    placement_policies: Mapping[str, PlacementPolicy] = field(default_factory=lambda: PLACEMENT_POLICIES)

    def models(self) -> list[tuple[str, str]]:
        """Returns the (model, alias) that it serves with and beside, "" for the service's own."""
        named = [(self.model, self.model_alias)]
        if self.shadow_model_alias:
            named.append((self.model, self.shadow_model_alias))
        return named

    def policy(self, placement: str) -> PlacementPolicy:
        """Returns the placement's policy; a placement that nobody named is like "home"."""
        return self.placement_policies.get(placement) or self.placement_policies["home"]


DEFAULT = ServingConfig(
    "default", "Sequence model blended with co-occurrence", Scorer.BLENDED, diversity_strength=0.1
)
POPULAR = ServingConfig("popular", "Popularity alone: the control arm", Scorer.POPULARITY)
SIMILAR = ServingConfig("similar", "Item to item", Scorer.ITEM_TO_ITEM)

BUILT_IN: Mapping[str, ServingConfig] = {
    config.serving_config_id: config for config in (DEFAULT, POPULAR, SIMILAR)
}
