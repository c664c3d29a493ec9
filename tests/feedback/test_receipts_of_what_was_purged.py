"""Events go before their person does: the models that read them are on the receipt all the same."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from services.feedback.__main__ import Feedback
from services.feedback.storage.partitions import drop_month, month_of, remember_month
from services.feedback.storage.retention import Retention
from tests.feedback.conftest import STORED, Shop, item_view
from tests.feedback.test_people import export, forget, versions, write_version
from tests.feedback.test_upkeep import NEW_YEAR, at, door, purge, rotatable, rotated, view_on

__all__ = ["rotatable"]
READ, UNREAD = "20200102t000000z-bbbbbb", "20200101t000000z-aaaaaa"


def by_hand(shop: Shop) -> None:
    assert purge(shop, force=True, end_time=at(NEW_YEAR + timedelta(days=40))).event_count == 2


def by_age(shop: Shop) -> None:
    Retention(shop.feedback.database, 30, lambda: datetime(2024, 4, 10, tzinfo=UTC)).run()


def late_by_age(shop: Shop) -> None:
    """The month is gone when the events come, so that the default partition takes them."""
    by_age(shop)
    assert shop.statuses(view_on(NEW_YEAR, user_id="late")) == [STORED]
    by_age(shop)


def remembered(shop: Shop) -> set[bytes]:
    return {bytes(key) for (key,) in shop.sql("SELECT user_key FROM feedback.purged_people")}


@pytest.mark.parametrize("events_go", [by_hand, by_age, late_by_age])
def test_models_that_read_what_is_gone_are_named(shop: Shop, events_go: Callable[[Shop], None]) -> None:
    began = datetime.now(UTC)
    shop.record(
        view_on(NEW_YEAR), view_on(NEW_YEAR + timedelta(days=1), user_id="bob"), item_view(user_id="new")
    )
    write_version(shop, UNREAD, began - timedelta(seconds=1))
    write_version(shop, READ, datetime.now(UTC) + timedelta(seconds=1))
    events_go(shop)
    assert shop.count() == 1
    # It is known of a person until they ask to be forgotten, and so it is told to who asks for it.
    consent, purged = export(shop, "ada")
    assert (consent["type"], purged["type"]) == ("consent", "purged_events")
    assert datetime.fromisoformat(purged["first_received_at"]) >= began
    assert [line["type"] for line in export(shop, "new")] == ["consent", "event"]
    receipt = forget(shop, "ada")
    assert {row.table: row.row_count for row in receipt.erased_rows}["events"] == 0
    assert versions(receipt) == {READ}
    ada, bob = (door(shop.feedback).keys_of(user)[0] for user in ("ada", "bob"))
    assert ada not in remembered(shop)
    assert bob in remembered(shop)
    # Again, and after events came in anew.
    assert versions(forget(shop, "ada")) == {READ}
    shop.record(item_view(user_id="bob"))
    assert versions(forget(shop, "bob")) == {READ}
    assert versions(forget(shop, "nobody")) == set()


def test_what_comes_into_a_month_while_it_goes_is_remembered(shop: Shop) -> None:
    shop.record(view_on(NEW_YEAR))
    month = month_of(NEW_YEAR)
    with shop.feedback.database.connect() as connection:
        below = remember_month(connection, month)
    shop.record(view_on(NEW_YEAR, user_id="bob"))
    with shop.feedback.database.connect() as connection:
        assert drop_month(connection, month, below) == 2
    assert remembered(shop) == {door(shop.feedback).keys_of(user)[0] for user in ("ada", "bob")}


def test_of_who_was_forgotten_meanwhile_nothing_is_remembered(shop: Shop) -> None:
    shop.record(view_on(NEW_YEAR), view_on(NEW_YEAR, user_id="bob"))
    write_version(shop, READ, datetime.now(UTC) + timedelta(seconds=1))
    with shop.feedback.database.connect() as connection:
        # Read while her events are there, and committed after she is gone.
        remember_month(connection, month_of(NEW_YEAR))
        receipt = forget(shop, "ada")
    assert versions(receipt) == {READ}
    by_age(shop)
    assert remembered(shop) == {door(shop.feedback).keys_of("bob")[0]}


def test_a_rotation_takes_it_along(shop: Shop, rotatable: Callable[[], Feedback]) -> None:
    shop.record(view_on(NEW_YEAR), view_on(NEW_YEAR, user_id="bob"))
    by_age(shop)
    # One is there as well, one has nothing left.
    shop.record(item_view(user_id="bob"))
    feedback = rotatable()
    rotated(feedback)
    assert remembered(shop) == {door(feedback).keys_of(user)[0] for user in ("ada", "bob")}
