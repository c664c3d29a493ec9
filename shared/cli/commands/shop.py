"""Commands about shoppers and items: what comes in, what is known, what is shown."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer
from google.protobuf import json_format
from shopkeeper.feedback.v1 import consent_pb2, feedback_service_pb2
from shopkeeper.profile.v1 import profile_service_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2

from shared.cli import import_data, people, recommendations
from shared.cli import simulate as simulation
from shared.cli.clients import Clients
from shared.cli.commands.options import (
    CALL_TIMEOUT_SECONDS,
    HomeOption,
    JsonOption,
)
from shared.cli.installation import Installation
from shared.cli.output import EXIT_OK, EXIT_PROBLEMS, message_dict, reports_errors, say, show_json, show_table
from shared.errors import InvalidInput
from shared.importing.mapping import shipped_mappings
from shared.keys import read_verifying_key
from shared.simulation.history import Scale


@reports_errors
def import_(
    path: Annotated[
        Path, typer.Argument(help="A directory, or one file: CSV, JSON lines or Parquet; .gz as well.")
    ],
    mapping: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="A shipped mapping's name or a .yaml file. Default: the shipped one whose columns fit."
        ),
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Bring in events and items. Doing it twice adds nothing."""
    with Clients(Installation.from_environment(home)) as clients:
        imported = import_data.import_path(clients, path, mapping, quiet=as_json)
    import_data.show_import(imported, as_json=as_json)
    raise typer.Exit(imported.exit_code)


@reports_errors
def mappings(as_json: JsonOption = False) -> None:
    """List the mappings that come with Shopkeeper."""
    shipped = shipped_mappings()
    if as_json:
        show_json([{"name": m.name, "title": m.title, "note": m.note} for m in shipped.values()])
        return
    show_table("Mappings", ("name", "for", "note"), [(m.name, m.title, m.note) for m in shipped.values()])


@reports_errors
def simulate(
    shoppers: Annotated[int, typer.Option(min=10, max=200_000)] = 2_000,
    items: Annotated[int, typer.Option(min=24, max=20_000)] = 500,
    days: Annotated[int, typer.Option(min=1, max=3_650)] = 90,
    seed: Annotated[int, typer.Option(min=0)] = 1,
    live: Annotated[
        int,
        typer.Option(min=0, help="Instead of a past: play so many visits that are shown recommendations."),
    ] = 0,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """SIMULATION: fill the suite with a made-up shop, or send made-up shoppers to it."""
    installation = Installation.from_environment(home)
    with Clients(installation) as clients:
        if live:
            world = simulation.saved_world(installation)
            report, uploader = simulation.simulate_live(clients, world, live, quiet=as_json)
            raise typer.Exit(simulation.show_live(report, uploader, as_json=as_json))
        # History ends a little ago, so that live events come after it.
        end_us = (int(time.time()) - 900) * 1_000_000
        scale = Scale(seed=seed, shoppers=shoppers, items=items, days=days, end_us=end_us)
        past = simulation.simulate_history(clients, installation, scale, quiet=as_json)
    counts = past.uploader.report
    if as_json:
        show_json({"label": simulation.LABEL, "events": dict(counts.events), "items": dict(counts.items)})
    else:
        stored = counts.events["stored"]
        say(
            f"{simulation.LABEL}: {stored:,} events of {len(past.events_of_user):,} shoppers, {items:,} items."
        )
        for sample in counts.samples:
            say(f"  {sample}")
    raise typer.Exit(EXIT_PROBLEMS if counts.refused else EXIT_OK)


@reports_errors
def recommend(
    user: str,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=100)] = 10,
    placement: Annotated[str, typer.Option(help="Where the items are to be shown.")] = "home",
    serving_config: Annotated[
        str, typer.Option(help="Serving config: default, popular, or one of your own.")
    ] = "",
    filter_: Annotated[str, typer.Option("--filter", help="Such as: price < 30 AND in_stock")] = "",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a shopper would be shown, and why."""
    with Clients(Installation.from_environment(home)) as clients:
        answer = clients.recommend.Recommend(
            recommend_service_pb2.RecommendRequest(
                user_id=user, placement=placement, serving_config=serving_config, page_size=count, filter=filter_,
                include_explanations=True,
            ),
            timeout=CALL_TIMEOUT_SECONDS,
        )  # fmt: skip
    recommendations.show_recommendations(answer, user, as_json=as_json)


@reports_errors
def explain(
    user: str,
    item: str,
    placement: Annotated[str, typer.Option(help="Where the items are to be shown.")] = "home",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say why an item is recommended to a shopper, or why not."""
    with Clients(Installation.from_environment(home)) as clients:
        request = recommend_service_pb2.RecommendRequest(
            user_id=user, placement=placement, include_explanations=True
        )
        answer = clients.recommend.Explain(
            recommend_service_pb2.ExplainRequest(request=request, item_id=item), timeout=CALL_TIMEOUT_SECONDS
        )
    recommendations.show_explanation(answer, user, item, as_json=as_json)


@reports_errors
def profile(user: str, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show what is known of a shopper."""
    with Clients(Installation.from_environment(home)) as clients:
        answer = clients.profile.GetProfile(
            profile_service_pb2.GetProfileRequest(user_id=user, view=profile_service_pb2.PROFILE_VIEW_FULL),
            timeout=CALL_TIMEOUT_SECONDS,
        )
        people.show_profile(clients, answer, user, as_json=as_json)


@reports_errors
def forget(
    user: str,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask. Needed where nobody can answer.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Erase everything about a shopper, for ever."""
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidInput(
                "NOT_CONFIRMED", "Nothing was erased: nobody can be asked here. Repeat with --yes."
            )
        if not typer.confirm(f"Erase everything about {user}, for ever?"):
            say("Nothing was erased.")
            raise typer.Exit(EXIT_PROBLEMS)
    with Clients(Installation.from_environment(home)) as clients:
        receipt = clients.feedback.ForgetUser(
            feedback_service_pb2.ForgetUserRequest(user_id=user), timeout=CALL_TIMEOUT_SECONDS
        )
    people.show_receipt(receipt, as_json=as_json)


@reports_errors
def receipt(receipt_id: str, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Issue an erasure receipt anew: which models may hold the shopper now."""
    with Clients(Installation.from_environment(home)) as clients:
        answer = clients.feedback.GetErasureReceipt(
            feedback_service_pb2.GetErasureReceiptRequest(receipt_id=receipt_id), timeout=CALL_TIMEOUT_SECONDS
        )
    people.show_receipt(answer, as_json=as_json)


@reports_errors
def unknown_items(
    limit: Annotated[
        int, typer.Option(min=1, help="The most items to show; those with most events first.")
    ] = 50,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List items that events name and the catalogue does not know."""
    found: list[feedback_service_pb2.UnknownItem] = []
    token, answer = "", feedback_service_pb2.ListUnknownItemsResponse()
    with Clients(Installation.from_environment(home)) as clients:
        while len(found) < limit and (token or not found):
            answer = clients.feedback.ListUnknownItems(
                feedback_service_pb2.ListUnknownItemsRequest(page_size=limit - len(found), page_token=token),
                timeout=CALL_TIMEOUT_SECONDS,
            )
            found += answer.unknown_items
            token = answer.next_page_token
            if not token:
                break
    compared = answer.compared_time.ToJsonString()[:19] if answer.HasField("compared_time") else ""
    if as_json:
        show_json(
            {
                "total": answer.total_size,
                "compared": compared or None,
                "items": [message_dict(i) for i in found],
            }
        )
        return
    if not compared:
        say("The log was never compared with the catalogue: profile is away, or has no items.")
        return
    show_table(
        f"{answer.total_size:,} items that the catalogue does not know, as of {compared}",
        ("item", "#events", "first seen (UTC)", "last seen (UTC)"),
        [
            (
                i.item_id,
                f"{i.event_count:,}",
                i.first_seen_time.ToJsonString()[:19],
                i.last_seen_time.ToJsonString()[:19],
            )
            for i in found
        ],
    )


@reports_errors
def verify_receipt(
    file: Annotated[
        Path, typer.Argument(help="What `shopkeeper forget --json` or `receipt --json` printed.")
    ],
    key: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Directory with signing_key.pub.pem. Default: the suite's keys."),
    ] = None,
    home: HomeOption = None,
) -> None:
    """Check the signature of an erasure receipt, and print what was signed. Needs no running service."""
    try:
        receipt = json_format.Parse(file.read_text(), consent_pb2.ErasureReceipt())
    except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
        raise InvalidInput("INVALID_ARGUMENT", f"{file} is no receipt: {error}") from None
    installation = Installation.from_environment(home)
    show_json(people.verify_receipt(receipt, read_verifying_key(key or installation.keys)))


@reports_errors
def metrics(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show online metrics of the last seven days, by serving config."""
    installation = Installation.from_environment(home)
    with Clients(installation) as clients:
        answer = recommendations.metrics_by_serving_config(clients)
    simulated = Path(simulation.scale_path(installation)).exists()
    recommendations.show_metrics(answer, as_json=as_json, label=f"{simulation.LABEL}: " if simulated else "")
