"""Every dependency, failing in every way: each call is answered, with items, inside its deadline."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb

from shared.experiments import variant_label
from tests.recommend.chaos import Neighbour, Proxy, Wire
from tests.recommend.shop import Shop, causes, eventually, point
from tests.recommend.test_service import IDS, VECTORS

MakeShop = Callable[..., Shop]
DEADLINE_SECONDS = 1.0
SECONDS = float(os.environ.get("SHOPKEEPER_CHAOS_SECONDS", "1"))


class Town:
    """A shop whose neighbours are processes behind wires."""

    def __init__(self, make_shop: MakeShop, *, with_feedback: bool = False) -> None:
        self.shop = make_shop(experiment_poll_seconds=0.1)
        self.shop.publish(IDS, VECTORS, pairs={("shoe-1", "hat"): 0.9})
        keys = {name: self.shop.user_key(name).hex() for name in ("ann", "bob")}
        self.neighbour = Neighbour(IDS, {keys["ann"]: ["shoe-1"], keys["bob"]: ["hat"]})
        self.wire = Proxy(self.neighbour.port)
        self.feedback_wire = Proxy(self.neighbour.feedback_port)
        changed = {"profile_address": f"127.0.0.1:{self.wire.port}"}
        if with_feedback:
            changed["feedback_address"] = f"127.0.0.1:{self.feedback_wire.port}"
        self.shop.settings = self.shop.settings.model_copy(update=changed)
        self.shop.start()
        # Asked for once, ann is known from now on.
        eventually(lambda: self.ask("ann").freshness.events_used == 1)

    def ask(self, user_id: str, **fields: object) -> pb.RecommendResponse:
        request = pb.RecommendRequest(user_id=user_id, page_size=3, **fields)  # type: ignore[arg-type]
        return self.shop.stub.Recommend(request, timeout=DEADLINE_SECONDS)

    def every_call_is_answered(self) -> set[str]:
        """Asks in every way, over and over; returns what the answers went without."""
        missing: set[str] = set()
        end = time.monotonic() + SECONDS
        number = 0
        while time.monotonic() < end:
            number += 1
            for answer in (
                self.ask("ann"),
                self.ask("ann", consistency_token=self.shop.token(10**6 + number)),
                self.ask(f"stranger-{number}"),
                self.ask(f"newcomer-{number}", context_events=[{"item_id": "shoe-1"}]),
                self.ask("bob", include_explanations=True, placement="cart"),
            ):
                assert len(answer.items) == 3
                missing |= causes(answer)
        return missing

    def close(self) -> None:
        self.wire.close()
        self.feedback_wire.close()
        self.neighbour.close()


@pytest.fixture
def town(make_shop: MakeShop) -> Iterator[Town]:
    town = Town(make_shop)
    yield town
    town.close()


PROFILE_FAILS: dict[str, Callable[[Town], None]] = {
    "killed": lambda town: town.neighbour.kill(),
    "stopped": lambda town: town.neighbour.halt(),
    "slow": lambda town: town.wire.become(Wire.SLOW),
    "cut": lambda town: town.wire.become(Wire.CUT),
    "half open": lambda town: town.wire.become(Wire.HALF_OPEN),
}


@pytest.mark.parametrize("failure", PROFILE_FAILS)
def test_profile_fails(town: Town, failure: str) -> None:
    assert town.every_call_is_answered() <= {"CONSISTENCY_NOT_REACHED"}
    PROFILE_FAILS[failure](town)
    missing = town.every_call_is_answered()
    assert "CONSISTENCY_NOT_REACHED" in missing
    # Whatever is late or gone, ann's history is held here, and used.
    assert town.ask("ann").freshness.events_used == 1


FEEDBACK_FAILS: dict[str, Callable[[Town], None]] = {
    # A process that is killed or stopped takes profile along, whose stand-in lives there too.
    "killed": lambda town: town.neighbour.kill(),
    "stopped": lambda town: town.neighbour.halt(),
    "slow": lambda town: town.feedback_wire.become(Wire.SLOW),
    "cut": lambda town: town.feedback_wire.become(Wire.CUT),
    "half open": lambda town: town.feedback_wire.become(Wire.HALF_OPEN),
}


@pytest.mark.parametrize("failure", FEEDBACK_FAILS)
def test_feedback_fails(make_shop: MakeShop, failure: str) -> None:
    town = Town(make_shop, with_feedback=True)
    try:
        eventually(lambda: town.ask("ann").model.serving_config == "popular")
        FEEDBACK_FAILS[failure](town)
        town.every_call_is_answered()
        # People stay where the experiment has put them.
        model = town.ask("ann").model
        assert (model.serving_config, model.variant) == ("popular", variant_label("split", "all"))
    finally:
        town.close()


def hang(alias_file: Path) -> None:
    """A file whose reader waits for ever: a network disk that is gone."""
    alias_file.unlink()
    os.mkfifo(alias_file)


REGISTRY_FAILS: dict[str, Callable[[Shop, Path], None]] = {
    "removed": lambda shop, _alias: shutil.rmtree(shop.registry),
    "unreadable": lambda _shop, alias: alias.write_bytes(b""),
    "half written": lambda _shop, alias: alias.write_bytes(alias.read_bytes()[:40]),
    "hanging": lambda _shop, alias: hang(alias),
    "pointing nowhere": lambda shop, _alias: point(shop.registry, "20990101t000000z-000000"),
}


@pytest.mark.parametrize("failure", REGISTRY_FAILS)
def test_the_registry_fails(town: Town, failure: str) -> None:
    version = town.ask("ann").model.version
    alias_file = town.shop.registry / "main" / "aliases" / "production.json"
    REGISTRY_FAILS[failure](town.shop, alias_file)
    missing = town.every_call_is_answered()
    assert missing <= {"CONSISTENCY_NOT_REACHED"}
    assert town.ask("ann").model.version == version
    if failure == "hanging":
        # Lets the reader go, or the service could not be stopped.
        with alias_file.open("wb"):
            pass


def test_everything_fails_at_once(town: Town) -> None:
    shutil.rmtree(town.shop.registry)
    town.wire.become(Wire.HALF_OPEN)
    town.every_call_is_answered()
    town.wire.become(Wire.CUT)
    town.neighbour.kill()
    assert {"PROFILE_STALE", "PROFILE_UNAVAILABLE"} <= town.every_call_is_answered()
