"""`shopkeeper simulate`: SIMULATION of a shop, its past and its live visits."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass

from shared.cli.clients import Clients
from shared.cli.installation import Installation
from shared.cli.output import EXIT_OK, EXIT_PROBLEMS, say, show_json, show_table
from shared.cli.progress import StepProgress
from shared.errors import FailedPrecondition
from shared.importing.upload import Uploader
from shared.simulation.history import Scale, World, make_history
from shared.simulation.live import LiveReport, LiveShop

LABEL = "SIMULATION"


@dataclass(frozen=True, slots=True)
class SimulatedPast:
    """The world after its history, and who did how much."""

    world: World
    uploader: Uploader
    events_of_user: Counter[str]
    seconds: float


def scale_path(installation: Installation) -> str:
    """Returns where the scale of the simulated history is kept, so that live visits go on with the same world."""
    return str(installation.home / "run" / "simulation.json")


def simulate_history(
    clients: Clients, installation: Installation, scale: Scale, *, quiet: bool = False
) -> SimulatedPast:
    """Makes a history and records it."""
    start = time.monotonic()
    with StepProgress(f"{LABEL}: making {scale.shoppers:,} shoppers' past", enabled=not quiet):
        world, batch = make_history(scale)
    uploader = Uploader(clients.channels["feedback"], clients.channels["profile"])
    records = world.shop.records()
    with StepProgress(f"{LABEL}: catalogue", "items", enabled=not quiet) as progress:
        for count in uploader.send_items(records[i : i + 500] for i in range(0, len(records), 500)):
            progress.update(1.0, count)
    with StepProgress(f"{LABEL}: history", "events", enabled=not quiet) as progress:
        sent = 0
        for count in uploader.send_events(batch.parts()):
            sent += count
            progress.update(sent / len(batch), sent)
    installation.prepare()
    with open(scale_path(installation), "w") as file:
        json.dump(asdict(scale), file)
    return SimulatedPast(world, uploader, Counter(batch.user_ids), time.monotonic() - start)


def saved_world(installation: Installation) -> World:
    """Returns the world of the history that was simulated here.

    Raises:
        FailedPrecondition: NO_SIMULATION.
    """
    try:
        with open(scale_path(installation)) as file:
            scale = Scale(**json.load(file))
    except (OSError, ValueError, TypeError) as error:
        raise FailedPrecondition(
            "NO_SIMULATION",
            "No history has been simulated here. Run `shopkeeper simulate` without --live first.",
        ) from error
    return make_history(scale)[0]


def simulate_live(
    clients: Clients, world: World, visits: int, *, quiet: bool = False
) -> tuple[LiveReport, Uploader]:
    """Plays live visits against Recommend and returns what the simulated shoppers did."""
    uploader = Uploader(clients.channels["feedback"], clients.channels["profile"])
    shop = LiveShop(world, clients.channels["recommend"], uploader)
    with StepProgress(f"{LABEL}: live visits", "visits", enabled=not quiet) as progress:
        for done in shop.play(visits):
            progress.update(done / visits, done)
    return shop.report, uploader


def show_live(report: LiveReport, uploader: Uploader, *, as_json: bool) -> int:
    """Prints what happened in each arm; returns the exit code."""
    if as_json:
        show_json({"label": LABEL, **asdict(report), "events": dict(uploader.report.events)})
    else:
        rows = [
            (arm, c.visits, c.pages, c.clicks, f"{c.clicks / max(1, c.pages):.3f}", c.carts, c.purchases)
            for arm, c in report.arms.items()
        ]
        show_table(
            f"{LABEL}: what simulated shoppers did",
            ("arm", "#visits", "#pages", "#clicks", "#clicks a page", "#carts", "#orders"), rows,
            note="Made-up shoppers. The numbers say nothing about people.",
        )  # fmt: skip
    if report.failed_pages:
        say(f"{report.failed_pages} pages failed; the last one: {report.last_error}")
    return EXIT_PROBLEMS if report.failed_pages or uploader.report.refused else EXIT_OK
