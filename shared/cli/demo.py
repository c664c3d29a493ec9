"""`shopkeeper demo`: the whole loop on this machine, and whether it holds.

Events go in, a model is trained and served, five shoppers are shown before and after one more click,
offline and online metrics are printed beside popularity. Fails (exit code 1) where the loop does not
hold: the click changed nothing, the model lost to popularity, rows were refused. Where few shoppers touched more
than one item, items seen before take part in the offline ranking: what people come back to is the question then.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from rich.markup import escape
from rich.table import Table
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2, recommendation_pb2
from shopkeeper.trainer.v1 import model_pb2, trainer_service_pb2

from shared.cli import import_data, recommendations, simulate, train
from shared.cli.clients import Clients
from shared.cli.installation import (
    FIRST_PORT,
    Installation,
    configured_addresses,
    free_first_port,
    port_is_free,
)
from shared.cli.output import EXIT_OK, EXIT_PROBLEMS, say, show_titled
from shared.cli.people import title_of
from shared.cli.progress import StepProgress
from shared.cli.supervisor import Supervisor
from shared.errors import FailedPrecondition, NotFound
from shared.simulation.history import Scale, World

MARKER = ".made-by-shopkeeper-demo"
SHOPPERS_SHOWN = 5
ITEMS_SHOWN = 5
LIVE_VISITS = 500
TRAIN_SECONDS = 40
FEW_EXPLORERS = 0.2
SERVE_TIMEOUT_SECONDS = 60.0
CATCH_UP_TIMEOUT_SECONDS = 120.0
CALL_TIMEOUT_SECONDS = 15.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(slots=True)
class Verdict:
    """What the demo found to be wrong; nothing means that the loop holds."""

    wrong: list[str] = field(default_factory=list)
    beats_popularity: bool = True

    def expect(self, holds: bool, complaint: str) -> None:
        if not holds:
            self.wrong.append(complaint)


def run_demo(
    home: Path, data: Path | None, mapping: str | None, *, once: bool, first_port: int | None
) -> int:
    """Runs the demo; returns the exit code.

    Raises:
        ShopkeeperError: a step could not be done at all.
    """
    began = time.monotonic()
    installation = _fresh_home(home)
    supervisor = Supervisor(installation, _addresses(first_port))
    verdict = Verdict()
    with _interrupted_by_signals():
        try:
            with StepProgress("Starting PostgreSQL and the four services"):
                supervisor.start()
            with Clients(installation) as clients:
                _play(clients, installation, data, mapping, verdict)
            _conclude(verdict, time.monotonic() - began)
            if not once:
                _show_next_steps(installation, supervisor)
                # From here on a signal is the way to end it, not an interruption.
                with suppress(KeyboardInterrupt):
                    supervisor.watch()
        finally:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            with StepProgress("Stopping"):
                supervisor.stop()
    return EXIT_PROBLEMS if verdict.wrong else EXIT_OK


def _fresh_home(home: Path) -> Installation:
    installation = Installation(home)
    running = installation.running()
    if running is not None:
        raise FailedPrecondition(
            "ALREADY_UP",
            f"A suite is up in {installation.home} (process {running.supervisor_pid}). "
            f"End it with `shopkeeper down --home {home}`, or choose another --home.",
        )
    if installation.home.exists() and any(installation.home.iterdir()):
        if not (installation.home / MARKER).exists():
            raise FailedPrecondition(
                "HOME_UNUSABLE",
                f"{installation.home} holds something that no demo made; the demo would erase it. Choose another --home.",
            )
        shutil.rmtree(installation.home)
    installation.prepare()
    (installation.home / MARKER).touch()
    return installation


def _addresses(first_port: int | None) -> dict[str, str]:
    if first_port is not None:
        return configured_addresses(first_port)
    addresses = configured_addresses()
    if all(port_is_free(address) for address in addresses.values()):
        return addresses
    found = free_first_port(FIRST_PORT + 200)
    say(f"Some of the usual ports are taken; the demo uses {found} to {found + 3}.")
    return configured_addresses(found)


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _play(
    clients: Clients, installation: Installation, data: Path | None, mapping: str | None, verdict: Verdict
) -> None:
    world: World | None = None
    label = ""
    exclude_seen = True
    if data is None:
        label = f"{simulate.LABEL}: "
        past = simulate.simulate_history(
            clients, installation, Scale(end_us=(int(time.time()) - 900) * 1_000_000)
        )
        world, users, report = past.world, past.events_of_user, past.uploader.report
    else:
        imported = import_data.import_path(clients, data, mapping)
        import_data.show_import(imported, as_json=False)
        users, report = imported.events_of_user, imported.uploader.report
        if not users:
            raise NotFound("NO_EVENTS", f"{data} has items but no events; the demo needs shoppers.")
    if data is not None and imported.explorer_share < FEW_EXPLORERS:
        exclude_seen = False
        say(
            f"Only {imported.explorer_share:.0%} of the shoppers touched more than one item. What they come back to is "
            "the question here, so items seen before are part of the ranking."
        )
    verdict.expect(
        report.refused == 0, f"{report.refused} rows were refused: {'; '.join(report.samples[:3])}"
    )
    run = train.create_run(clients, max_seconds=TRAIN_SECONDS, exclude_seen=exclude_seen)
    run = train.watch_run(clients, run.run_id)
    train.show_run(clients, run, as_json=False)
    verdict.expect(bool(run.version), f"training: {run.failure.message or 'no version was published'}")
    if run.version:
        _judge_offline(train.evaluation_of(clients, run), verdict)
        # The simulation has enough to learn from; real data may be too thin for a gate that asks for certainty.
        verdict.expect(run.promoted or data is not None, "the gate refused the version")
        if not run.promoted and not verdict.wrong:
            say("The demo serves it all the same, to show the loop; a shop would go on with what it had.")
            clients.trainer.PromoteModel(
                trainer_service_pb2.PromoteModelRequest(
                    model=run.model,
                    version=run.version,
                    force=True,
                    comment="The demo shows a version that the gate refused.",
                ),
                timeout=CALL_TIMEOUT_SECONDS,
            )
        if run.promoted or not verdict.wrong:
            _wait_until_served(clients, run.version, verdict)
    _before_and_after(clients, users, report.consistency_token, label, verdict)
    if world is not None:
        since = time.time() - 1
        live, uploader = simulate.simulate_live(clients, world, LIVE_VISITS)
        simulate.show_live(live, uploader, as_json=False)
        verdict.expect(live.failed_pages == 0, f"{live.failed_pages} live pages failed: {live.last_error}")
        metrics = recommendations.metrics_by_serving_config(clients, since)
        recommendations.show_metrics(metrics, as_json=False, label=label)
        _judge_online(metrics, verdict)
    else:
        say("Online metrics need live traffic: none is made up for real data. Offline numbers are above.")


def _wait_until_served(clients: Clients, version: str, verdict: Verdict) -> None:
    deadline = time.monotonic() + SERVE_TIMEOUT_SECONDS
    with StepProgress("Putting the model into service"):
        while time.monotonic() < deadline:
            try:
                status = clients.recommend.GetModelStatus(
                    recommend_service_pb2.GetModelStatusRequest(), timeout=CALL_TIMEOUT_SECONDS
                )
            except grpc.RpcError:
                time.sleep(0.5)
                continue
            if any(model.version == version for model in status.models):
                return
            refused = next((r for r in status.refused if r.version == version), None)
            if refused is not None:
                verdict.expect(False, f"recommend refused {version}: {refused.text}")
                return
            time.sleep(0.2)
    verdict.expect(False, f"recommend did not serve {version} within {SERVE_TIMEOUT_SECONDS:.0f} s")


def _before_and_after(
    clients: Clients, users: Counter[str], token: str, label: str, verdict: Verdict
) -> None:
    chosen = _typical_shoppers(users)
    popular = _ask(clients, None, "", config="popular", size=100)
    for number, user in enumerate(chosen):
        before = _ask(
            clients, user, token, timeout=CATCH_UP_TIMEOUT_SECONDS if number == 0 else CALL_TIMEOUT_SECONDS
        )
        item_id = _something_else(popular, before, number)
        if item_id is None:
            verdict.expect(False, "there is no item to click")
            return
        clicked_token = _click(clients, user, item_id)
        after = _ask(clients, user, clicked_token)
        _show_change(clients, user, item_id, before, after, label)
        # A click that confirms what the page shows may keep its order; the scores tell that it was heard.
        changed = [(i.item_id, i.score) for i in before.items] != [(i.item_id, i.score) for i in after.items]
        verdict.expect(changed, f"a click on {item_id} changed nothing for {user}")
        missed = recommendation_pb2.Degradation.CAUSE_CONSISTENCY_NOT_REACHED
        verdict.expect(
            all(d.cause != missed for d in after.degraded),
            f"the answer for {user} did not know of the click in time",
        )


def _typical_shoppers(users: Counter[str]) -> list[str]:
    """Returns shoppers with a middling number of events, the same ones every time."""
    enough = sorted(user for user, count in users.items() if 5 <= count <= 60) or sorted(users)
    step = max(1, len(enough) // SHOPPERS_SHOWN)
    return enough[::step][:SHOPPERS_SHOWN]


def _ask(
    clients: Clients, user: str | None, token: str, *, config: str = "", size: int = ITEMS_SHOWN,
    timeout: float = CALL_TIMEOUT_SECONDS,
) -> recommend_service_pb2.RecommendResponse:  # fmt: skip
    request = recommend_service_pb2.RecommendRequest(
        placement="home",
        serving_config=config,
        page_size=size,
        consistency_token=token,
        include_explanations=True,
    )
    if user is not None:
        request.user_id = user
    return clients.recommend.Recommend(request, timeout=timeout)


def _something_else(
    popular: recommend_service_pb2.RecommendResponse,
    before: recommend_service_pb2.RecommendResponse,
    number: int,
) -> str | None:
    """Returns an item that is not on the shopper's page, of another category where there is one: a change of mind."""
    shown = {item.item_id for item in before.items}
    categories = {tuple(item.item.category_path[:1]) for item in before.items}
    unseen = [item for item in popular.items if item.item_id not in shown]
    elsewhere = [item for item in unseen if tuple(item.item.category_path[:1]) not in categories]
    others = [item.item_id for item in elsewhere or unseen]
    # Another one for each shopper, away from the very top.
    return others[(7 + 11 * number) % len(others)] if others else None


def _click(clients: Clients, user: str, item_id: str) -> str:
    now_ms = int(time.time() * 1_000)
    event = event_pb2.Event(
        event_id=f"demo:{now_ms}:{user}"[:128], user_id=user, channel=event_pb2.CHANNEL_WEB
    )
    event.occurred_at.FromMilliseconds(now_ms)
    event.item_view.item_id = item_id
    answer = clients.feedback.RecordEvents(
        feedback_service_pb2.RecordEventsRequest(events=[event]), timeout=CALL_TIMEOUT_SECONDS
    )
    if answer.results[0].status != event_pb2.EVENT_STATUS_STORED:
        raise FailedPrecondition("CLICK_REFUSED", f"The click was refused: {answer.results[0].message}")
    return answer.consistency_token


def _show_change(
    clients: Clients, user: str, clicked: str,
    before: recommend_service_pb2.RecommendResponse, after: recommend_service_pb2.RecommendResponse, label: str,
) -> None:  # fmt: skip
    old = [item.item_id for item in before.items]
    table = Table()
    for column in ("", "before", "after", "why"):
        table.add_column(column, overflow="fold")
    for position in range(max(len(before.items), len(after.items))):
        left = _title(before.items[position]) if position < len(before.items) else ""
        right, mark, why = "", "", ""
        if position < len(after.items):
            item = after.items[position]
            right, why = _title(item), recommendations.reason_text(item.reasons)
            mark = (
                "new" if item.item_id not in old else "" if old.index(item.item_id) == position else "moved"
            )
        table.add_row(f"{position + 1} {mark}".strip(), escape(left), escape(right), escape(why))
    show_titled(table, f"{label}{user} looks at “{title_of(clients, clicked)}”")
    if after.degraded:
        say(f"  Went without: {recommendations.degradation_text(after.degraded)}")


def _title(item: recommendation_pb2.RecommendedItem) -> str:
    return item.item.title or item.item_id


def _judge_offline(report: model_pb2.EvaluationReport, verdict: Verdict) -> None:
    blend, popularity = (train.rung_of(report, name) for name in ("blend", "popularity"))
    if blend is None or popularity is None:
        verdict.expect(False, "the run has no offline metrics of the model and of popularity")
        return
    for name in ("hr@10", "ndcg@10"):
        ours, theirs = train.metric_of(blend.metrics, name), train.metric_of(popularity.metrics, name)
        if ours is None or theirs is None:
            verdict.expect(False, f"the run has no {name}")
            continue
        best_case = ours.high if ours.HasField("high") else ours.value
        verdict.expect(
            best_case >= theirs.value,
            f"the model lost to popularity: {name} {ours.value:.4f} against {theirs.value:.4f}",
        )
        verdict.beats_popularity &= ours.value > theirs.value


def _judge_online(metrics: Any, verdict: Verdict) -> None:
    rates = {row.serving_config: row.click_through_rate.value for row in metrics.rows}
    if not {"default", "popular"} <= set(rates):
        verdict.expect(
            False, f"online metrics name only {', '.join(sorted(rates)) or 'nothing'}, not both arms"
        )
    else:
        verdict.expect(
            rates["default"] > rates["popular"],
            f"online, the model lost to popularity: {rates['default']:.4f} against {rates['popular']:.4f}",
        )


def _conclude(verdict: Verdict, seconds: float) -> None:
    if verdict.wrong:
        for complaint in verdict.wrong:
            say(f"WRONG: {complaint}")
    else:
        say(
            "The loop holds: events in, a model out, every click changed the answer, and popularity is beaten."
        )
    say(f"The demo took {seconds:.0f} s.")


def _show_next_steps(installation: Installation, supervisor: Supervisor) -> None:
    say("The suite stays up until Ctrl-C. In another terminal:")
    say(f"  export SHOPKEEPER_HOME={installation.home}")
    say("  shopkeeper recommend USER; shopkeeper profile USER; shopkeeper models; shopkeeper doctor")
    for name, address in supervisor.addresses.items():
        say(f"  {name} answers gRPC at {address} (reflection is on)")
