"""What may not be shown, whatever its score."""

from __future__ import annotations

import numpy as np

from services.recommend.domain.catalog import Mask
from services.recommend.domain.recommendation import ListKind
from services.recommend.use_cases.eligibility import (
    Eligibility,
    Exclusions,
    FilterMasks,
    judge,
    rows_of,
    rows_within,
    shown_rows,
)
from services.recommend.use_cases.ranking import PERSONAL, Ranking


def judge_items(ranking: Ranking, filters: FilterMasks, filter_R: Mask | None) -> Eligibility:
    """Returns what may be shown to the shopper, with what speaks against the rest.

    Args:
        filter_R: the mask of the request's own filter; None where it has none.
    """
    world, query, policy = ranking.world, ranking.query, ranking.policy
    about = [*query.item_ids] if query.kind is not ListKind.CART else []
    if query.context_item_id:
        about.append(query.context_item_id)
    cart = [*query.cart_item_ids, *(query.item_ids if query.kind is ListKind.CART else ())]
    owned = np.empty(0, dtype=np.int32)
    if policy.exclude_owned and query.kind is not ListKind.BUY_AGAIN:
        owned = rows_within(world, ranking.history.owned_rows())
    excluded = np.concatenate(
        [rows_of(world, query.exclude_item_ids), shown_rows(world, query.page.shown_digests)]
    )
    seen = np.empty(0, dtype=np.int32)
    if policy.unseen_first and query.kind in PERSONAL:
        seen = rows_within(world, ranking.history.seen_rows())
    exclusions = Exclusions(
        seen=seen,
        excluded=excluded,
        in_cart=rows_of(world, cart) if policy.exclude_in_cart else np.empty(0, dtype=np.int32),
        owned=owned,
        context=rows_of(world, about),
    )
    return judge(
        world,
        exclusions,
        filter_R=filter_R,
        respects_stock=policy.exclude_out_of_stock,
        now=ranking.now,
        policy_R=filters.mask(policy.filter_text, world.catalog) if policy.filter_text else None,
        ruled_out_R=ranking.plan.ruled_out(world.size) if ranking.plan is not None else None,
    )
