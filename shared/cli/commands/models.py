"""Commands about training runs and model versions."""

from __future__ import annotations

from typing import Annotated

import typer
from shopkeeper.trainer.v1 import trainer_service_pb2

from shared.cli import train as training
from shared.cli.clients import Clients
from shared.cli.commands.options import (
    CALL_TIMEOUT_SECONDS,
    AliasOption,
    CommentOption,
    HomeOption,
    JsonOption,
    ModelOption,
)
from shared.cli.installation import Installation
from shared.cli.output import reports_errors, say, show_json
from shared.errors import InvalidInput


@reports_errors
def train(
    watch: Annotated[bool, typer.Option("--watch", help="Follow the run to its end.")] = False,
    model: ModelOption = "",
    size: Annotated[str, typer.Option(help="tiny, small, base or large. Default: small.")] = "",
    max_seconds: Annotated[
        int, typer.Option(min=0, help="The most seconds to spend on training; 0: the size's own.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    exclude_seen: Annotated[
        bool, typer.Option(help="Measure with items that a shopper has had before left out of the ranking.")
    ] = True,
    promote: Annotated[
        bool, typer.Option(help="Put the version into production when its gate passes.")
    ] = True,
    initial_version: Annotated[
        str, typer.Option("--from", metavar="VERSION", help="Begin at the weights of this version or alias.")
    ] = "",
    repeat: Annotated[
        str,
        typer.Option(metavar="VERSION", help="Do again what made this version, from what it was trained on."),
    ] = "",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model on the log. With --watch, exit code 1 says that the run or its gate failed."""
    if size and size not in training.SIZES:
        raise InvalidInput("UNKNOWN_SIZE", f"{size!r} is no size. Choose {', '.join(training.SIZES)}.")
    with Clients(Installation.from_environment(home)) as clients:
        if repeat:
            run = training.repeat_run(clients, model=model, version=repeat, promote=promote)
        else:
            run = training.create_run(
                clients, model=model, size=size, max_seconds=max_seconds, seed=seed, promote=promote,
                exclude_seen=exclude_seen, initial_version=initial_version,
            )  # fmt: skip
        if not watch:
            if as_json:
                show_json(run)
            else:
                say(f"Run {run.run_id} is queued. `shopkeeper watch {run.run_id}` follows it.")
            return
        run = training.watch_run(clients, run.run_id, quiet=as_json)
        raise typer.Exit(training.show_run(clients, run, as_json=as_json))


@reports_errors
def watch(run_id: str, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Follow a training run to its end."""
    with Clients(Installation.from_environment(home)) as clients:
        run = training.watch_run(clients, run_id, quiet=as_json)
        raise typer.Exit(training.show_run(clients, run, as_json=as_json))


@reports_errors
def models(model: ModelOption = "", home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List model versions with their measures."""
    with Clients(Installation.from_environment(home)) as clients:
        training.show_models(clients, model, as_json=as_json)


@reports_errors
def promote(
    version: str,
    model: ModelOption = "",
    alias: AliasOption = "production",
    force: Annotated[bool, typer.Option("--force", help="Even though the gate failed it. Recorded.")] = False,
    comment: CommentOption = "",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias at a version."""
    with Clients(Installation.from_environment(home)) as clients:
        answer = clients.trainer.PromoteModel(
            trainer_service_pb2.PromoteModelRequest(
                model=model, version=version, alias=alias, force=force, comment=comment
            ),
            timeout=CALL_TIMEOUT_SECONDS,
        )
    training.show_alias(answer, alias, as_json=as_json)


@reports_errors
def rollback(
    model: ModelOption = "",
    alias: AliasOption = "production",
    comment: CommentOption = "",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias back at the version before."""
    with Clients(Installation.from_environment(home)) as clients:
        answer = clients.trainer.RollbackModel(
            trainer_service_pb2.RollbackModelRequest(model=model, alias=alias, comment=comment),
            timeout=CALL_TIMEOUT_SECONDS,
        )
    training.show_alias(answer, alias, as_json=as_json)
