"""What a shopper did, as a number. Pure mirror of `shopkeeper.feedback.v1.EventKind`; a test holds them equal."""

from __future__ import annotations

from enum import IntEnum


class EventKind(IntEnum):
    """The kinds of events, as stored in the log. Numbers never change."""

    SEARCH = 1
    PAGE_VIEW = 2
    ITEM_VIEW = 3
    ADD_TO_CART = 4
    REMOVE_FROM_CART = 5
    PURCHASE = 6
    RETURN = 7
    RATING = 8
    REVIEW = 9
    WISH_LIST = 10
    SHARE = 11
    RECOMMENDATION_CLICK = 12
    AD_IMPRESSION = 13
    AD_CLICK = 14
    SUPPORT_QUESTION = 15
    SUPPORT_VERDICT = 16
    SURVEY = 17


INTEREST_KINDS: frozenset[EventKind] = frozenset(
    {
        EventKind.ITEM_VIEW,
        EventKind.ADD_TO_CART,
        EventKind.PURCHASE,
        EventKind.RATING,
        EventKind.REVIEW,
        EventKind.WISH_LIST,
        EventKind.SHARE,
        EventKind.RECOMMENDATION_CLICK,
    }
)
"""Kinds that express interest in an item: histories, and so models, are made of these alone."""
