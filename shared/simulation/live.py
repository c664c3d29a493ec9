"""SIMULATION: visits on a running suite. Shoppers are shown what Recommend answers; what they do goes back.

Two arms by a sticky hash of the shopper: serving configs "default" and "popular". Every page is an
answer of Recommend, shown in its order; impressions, clicks, carts and purchases carry its attribution
token, and the next page is asked for with the consistency token of the last events, so it knows them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import grpc
import numpy as np
from shopkeeper.feedback.v1 import event_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2, recommend_service_pb2_grpc

from shared.errors import ShopkeeperError
from shared.grpc_status import from_rpc_error
from shared.importing.upload import Uploader
from shared.simulation.history import MAX_PAGES, PAGE_SIZE, World
from shared.simulation.shop import CURRENCY, Ints
from shared.simulation.shoppers import NO_ITEM, begin_visits, check_out, look_at_page

ARMS = ("default", "popular")
PLACEMENT = "home"
VISITORS_AT_A_TIME = 64
CALLS_UNDER_WAY = 16
CALL_TIMEOUT_SECONDS = 10.0


def arm_of(user_id: str) -> str:
    """Returns the arm of a shopper: the same one on every visit."""
    return ARMS[blake2b(user_id.encode(), digest_size=1).digest()[0] % len(ARMS)]


@dataclass(slots=True)
class ArmCount:
    """What happened in one arm."""

    visits: int = 0
    pages: int = 0
    clicks: int = 0
    carts: int = 0
    purchases: int = 0


@dataclass(slots=True)
class LiveReport:
    """Counts of what the simulated shoppers did; the suite's own numbers are feedback's GetMetrics."""

    arms: dict[str, ArmCount] = field(default_factory=lambda: {arm: ArmCount() for arm in ARMS})
    degraded: int = 0
    failed_pages: int = 0
    last_error: str = ""


@dataclass(slots=True)
class _Page:
    items: Ints
    token: str


class LiveShop:
    """Plays visits of the world's shoppers against the suite. Deterministic given the suite's answers and `clock`."""

    def __init__(
        self,
        world: World,
        recommend: grpc.Channel,
        uploader: Uploader,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.world = world
        self.report = LiveReport()
        self._stub = recommend_service_pb2_grpc.RecommendServiceStub(recommend)
        self._uploader = uploader
        self._clock = clock
        self._index = {item_id: i for i, item_id in enumerate(world.shop.item_ids)}
        self._visit = 0
        self._run = int(clock() * 1_000)

    def play(self, visits: int) -> Iterator[int]:
        """Plays so many visits in waves; yields the number done after each wave.

        Raises:
            ShopkeeperError: the log did not take the events.
        """
        people = np.flatnonzero(~self.world.crowd.is_bot)
        rate = self.world.crowd.visits_per_day[people]
        done = 0
        while done < visits:
            count = min(VISITORS_AT_A_TIME, visits - done, people.size)
            rows = np.sort(self.world.rng.choice(people, count, replace=False, p=rate / rate.sum()))
            self._wave(rows)
            done += count
            yield done

    def _wave(self, rows: Ints) -> None:
        world, report = self.world, self.report
        users = [world.user_id(row) for row in rows.tolist()]
        arms = [arm_of(user) for user in users]
        sessions = [f"live-{self._run}-{self._visit + i}" for i in range(rows.size)]
        self._visit += rows.size
        for arm in arms:
            report.arms[arm].visits += 1
        # The model's clock: a visit a day on average would take weeks; here the days pass between waves.
        day = np.full(rows.size, world.scale.days + self._visit / max(1, len(world.crowd)))
        begin_visits(world.rng, world.shop, world.crowd, rows, day)
        carts: list[tuple[int, int, str]] = []
        active = np.arange(rows.size)
        token = ""
        for number in range(MAX_PAGES):
            if active.size == 0:
                break
            pages = self._pages(active, users, arms, token)
            shown = [i for i in active.tolist() if i in pages]
            if not shown:
                break
            at = np.array(shown)
            page = np.stack([pages[i].items for i in shown])
            choices = look_at_page(world.rng, world.shop, world.crowd, rows[at], page)
            events: list[event_pb2.Event] = []
            for n, i in enumerate(shown):
                token_of_page = pages[i].token
                base = f"simulation-live:{self._run}:{sessions[i]}:{number}"
                report.arms[arms[i]].pages += 1
                view = self._event(f"{base}:page", users[i], sessions[i], token_of_page)
                view.page_view.page_type = event_pb2.PAGE_TYPE_RECOMMENDATIONS
                view.page_view.placement = PLACEMENT
                for k, item in enumerate(page[n].tolist()):
                    if item != NO_ITEM:
                        view.page_view.impressions.add(item_id=world.shop.item_ids[item], position=k + 1)
                events.append(view)
                clicked = int(choices.clicked[n])
                if clicked == NO_ITEM:
                    continue
                report.arms[arms[i]].clicks += 1
                click = self._event(f"{base}:click", users[i], sessions[i], token_of_page)
                click.recommendation_click.item_id = world.shop.item_ids[clicked]
                click.recommendation_click.position = int(choices.clicked_position[n]) + 1
                events.append(click)
                if choices.to_cart[n]:
                    report.arms[arms[i]].carts += 1
                    cart = self._event(f"{base}:cart", users[i], sessions[i], token_of_page)
                    cart.add_to_cart.item_id = world.shop.item_ids[clicked]
                    cart.add_to_cart.price_micros = int(world.shop.price_micros[clicked])
                    cart.add_to_cart.currency_code = CURRENCY
                    events.append(cart)
                    if not any(c[:2] == (i, clicked) for c in carts):
                        carts.append((i, clicked, token_of_page))
            token = self._uploader.send_event_messages(events)
            active = at[choices.stays]
        self._check_out(rows, day, users, arms, sessions, carts)

    def _check_out(
        self, rows: Ints, day: Any, users: list[str], arms: list[str], sessions: list[str],
        carts: list[tuple[int, int, str]],
    ) -> None:  # fmt: skip
        if not carts:
            return
        world = self.world
        at = np.array([c[0] for c in carts])
        items = np.array([c[1] for c in carts])
        bought, _ = check_out(world.rng, world.shop, world.crowd, rows[at], items, day[at])
        events: list[event_pb2.Event] = []
        # One order for each page that it came from, so that each page gets its due.
        orders: dict[tuple[int, str], list[int]] = {}
        for n in np.flatnonzero(bought).tolist():
            orders.setdefault((carts[n][0], carts[n][2]), []).append(carts[n][1])
        for number, ((i, token), lines) in enumerate(orders.items()):
            self.report.arms[arms[i]].purchases += 1
            event = self._event(
                f"simulation-live:{self._run}:{sessions[i]}:order:{number}", users[i], sessions[i], token
            )
            event.purchase.order_id = f"{sessions[i]}-{number}"
            event.purchase.currency_code = CURRENCY
            for item in lines:
                event.purchase.lines.add(
                    item_id=world.shop.item_ids[item],
                    quantity=1,
                    price_micros=int(world.shop.price_micros[item]),
                )
            events.append(event)
        if events:
            self._uploader.send_event_messages(events)

    def _event(self, event_id: str, user_id: str, session_id: str, token: str) -> event_pb2.Event:
        event = event_pb2.Event(
            event_id=event_id, user_id=user_id, session_id=session_id, attribution_token=token,
            channel=event_pb2.CHANNEL_WEB,
        )  # fmt: skip
        # Whole milliseconds: a retry must repeat them.
        event.occurred_at.FromMilliseconds(int(self._clock() * 1_000))
        return event

    def _pages(self, active: Ints, users: list[str], arms: list[str], token: str) -> dict[int, _Page]:
        pages: dict[int, _Page] = {}
        waiting = active.tolist()
        for start in range(0, len(waiting), CALLS_UNDER_WAY):
            calls = []
            for i in waiting[start : start + CALLS_UNDER_WAY]:
                request = recommend_service_pb2.RecommendRequest(
                    user_id=users[i], placement=PLACEMENT, serving_config=arms[i], page_size=PAGE_SIZE,
                    consistency_token=token, item_view=recommend_service_pb2.ITEM_VIEW_ID, variant=arms[i],
                )  # fmt: skip
                calls.append((i, self._stub.Recommend.future(request, timeout=CALL_TIMEOUT_SECONDS)))
            for i, call in calls:
                try:
                    answer = call.result()
                except grpc.RpcError as rpc_error:
                    error: ShopkeeperError = from_rpc_error(rpc_error)
                    self.report.failed_pages += 1
                    self.report.last_error = str(error)
                    continue
                self.report.degraded += bool(answer.degraded)
                items = np.full(PAGE_SIZE, NO_ITEM)
                known = [self._index.get(item.item_id, NO_ITEM) for item in answer.items[:PAGE_SIZE]]
                items[: len(known)] = known
                pages[i] = _Page(items, answer.attribution_token)
        return pages
