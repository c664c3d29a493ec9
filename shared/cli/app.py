"""The command `shopkeeper`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from google.protobuf import json_format
from shopkeeper.feedback.v1 import consent_pb2, feedback_service_pb2
from shopkeeper.profile.v1 import profile_service_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2
from shopkeeper.trainer.v1 import trainer_service_pb2

from shared.cli import doctor as doctor_checks
from shared.cli import import_data, people, recommendations
from shared.cli import simulate as simulation
from shared.cli import train as training
from shared.cli.certs import TRUST_DOMAIN, issue_certificates
from shared.cli.clients import Clients
from shared.cli.demo import run_demo
from shared.cli.installation import Installation, configured_addresses, process_alive
from shared.cli.output import EXIT_CODES, EXIT_OK, EXIT_PROBLEMS, reports_errors, say, show_json
from shared.cli.prepare import prepare_secrets
from shared.cli.supervisor import START_TIMEOUT_SECONDS, Supervisor
from shared.errors import FailedPrecondition, InvalidInput, ShopkeeperError
from shared.importing.mapping import shipped_mappings
from shared.keys import read_verifying_key
from shared.simulation.history import Scale

CALL_TIMEOUT_SECONDS = 30.0
DEMO_HOME = Path(".shopkeeper-demo")

app = typer.Typer(
    name="shopkeeper",
    help="Shopkeeper: a suite of gRPC services that remembers an online shop's customers and knows what to show them.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# typer reads these at run time, so they are Optional[...] rather than a postponed `X | None`.
HomeOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--home", help="Home directory. Default: SHOPKEEPER_HOME, else ./.shopkeeper.", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout for programs.")]
FirstPortOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--first-port", min=1024, max=65_000, show_default=False,
        help="Use four ports from this one on (metrics 100 higher). Default: 7001, or SHOPKEEPER_*_ADDRESS.",
    ),
]  # fmt: skip
ModelOption = Annotated[str, typer.Option("--model", help="Model name. Default: main.", show_default=False)]
AliasOption = Annotated[str, typer.Option("--alias", help="Alias to change.")]
CommentOption = Annotated[str, typer.Option("--comment", help="Why; kept in the alias's history.")]


@app.command(epilog=EXIT_CODES)
@reports_errors
def up(
    home: HomeOption = None,
    first_port: FirstPortOption = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when the suite is ready; end it with `down`.")
    ] = False,
) -> None:
    """Start the suite, restart what crashes, and drain it on Ctrl-C.

    Without DATABASE_URL an embedded PostgreSQL is started in the home directory. Missing development keys are made.
    """
    installation = Installation.from_environment(home)
    supervisor = Supervisor(installation, configured_addresses(first_port))
    if detach:
        _detach(installation, supervisor, first_port)
        return

    def stop(number: int, frame: Any) -> None:
        supervisor.request_stop()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    try:
        supervisor.start()
        if supervisor.is_stopping:
            return
        for name, address in supervisor.addresses.items():
            say(f"{name} is ready at {address}")
        say("Shopkeeper is up. Ctrl-C ends it.")
        supervisor.watch()
        say("Draining …")
    finally:
        supervisor.stop()
    say("Shopkeeper is down.")


def _detach(installation: Installation, supervisor: Supervisor, first_port: int | None) -> None:
    supervisor.check_free()
    installation.prepare()
    log = installation.logs / "up.log"
    command = [sys.executable, "-m", "shared.cli.app", "up", "--home", str(installation.home)]
    if first_port is not None:
        command += ["--first-port", str(first_port)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + START_TIMEOUT_SECONDS + 30
    while time.monotonic() < deadline:
        state = installation.running()
        if state is not None and state.supervisor_pid == process.pid and state.ready:
            for name, address in state.addresses.items():
                say(f"{name} is ready at {address}")
            say("Shopkeeper is up. `shopkeeper down` ends it.")
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    else:
        process.terminate()
    sys.stderr.write(log.read_text(errors="replace"))
    raise typer.Exit(process.returncode or EXIT_PROBLEMS)


@app.command(epilog=EXIT_CODES)
@reports_errors
def down(home: HomeOption = None) -> None:
    """End the suite that runs in the home directory."""
    installation = Installation.from_environment(home)
    state = installation.running()
    if state is None:
        leftovers = installation.end_leftovers()
        installation.clear_state()
        if leftovers:
            say(f"Ended {', '.join(leftovers)}, whose supervisor had been killed.")
            return
        say(f"Nothing is up in {installation.home}.")
        return
    os.kill(state.supervisor_pid, signal.SIGTERM)
    deadline = time.monotonic() + 60
    while process_alive(state.supervisor_pid):
        if time.monotonic() > deadline:
            raise FailedPrecondition(
                "STILL_UP",
                f"Process {state.supervisor_pid} is still draining after 60 s; look into {installation.logs}.",
            )
        time.sleep(0.1)
    say("Shopkeeper is down.")


@app.command("import", epilog=EXIT_CODES)
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


@app.command(epilog=EXIT_CODES)
@reports_errors
def mappings(as_json: JsonOption = False) -> None:
    """List the mappings that come with Shopkeeper."""
    shipped = shipped_mappings()
    if as_json:
        show_json([{"name": m.name, "title": m.title, "note": m.note} for m in shipped.values()])
        return
    from shared.cli.output import show_table

    show_table("Mappings", ("name", "for", "note"), [(m.name, m.title, m.note) for m in shipped.values()])


@app.command(epilog=EXIT_CODES)
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


@app.command(epilog=EXIT_CODES)
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
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model on the log. With --watch, exit code 1 says that the run or its gate failed."""
    if size and size not in training.SIZES:
        raise InvalidInput("UNKNOWN_SIZE", f"{size!r} is no size. Choose {', '.join(training.SIZES)}.")
    with Clients(Installation.from_environment(home)) as clients:
        run = training.create_run(
            clients, model=model, size=size, max_seconds=max_seconds, seed=seed, promote=promote,
            exclude_seen=exclude_seen,
        )  # fmt: skip
        if not watch:
            if as_json:
                show_json(run)
            else:
                say(f"Run {run.run_id} is queued. `shopkeeper watch {run.run_id}` follows it.")
            return
        run = training.watch_run(clients, run.run_id, quiet=as_json)
        raise typer.Exit(training.show_run(clients, run, as_json=as_json))


@app.command(epilog=EXIT_CODES)
@reports_errors
def watch(run_id: str, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Follow a training run to its end."""
    with Clients(Installation.from_environment(home)) as clients:
        run = training.watch_run(clients, run_id, quiet=as_json)
        raise typer.Exit(training.show_run(clients, run, as_json=as_json))


@app.command(epilog=EXIT_CODES)
@reports_errors
def models(model: ModelOption = "", home: HomeOption = None, as_json: JsonOption = False) -> None:
    """List model versions with their measures."""
    with Clients(Installation.from_environment(home)) as clients:
        training.show_models(clients, model, as_json=as_json)


@app.command(epilog=EXIT_CODES)
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


@app.command(epilog=EXIT_CODES)
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


@app.command(epilog=EXIT_CODES)
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


@app.command(epilog=EXIT_CODES)
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


@app.command(epilog=EXIT_CODES)
@reports_errors
def profile(user: str, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show what is known of a shopper."""
    with Clients(Installation.from_environment(home)) as clients:
        answer = clients.profile.GetProfile(
            profile_service_pb2.GetProfileRequest(user_id=user, view=profile_service_pb2.PROFILE_VIEW_FULL),
            timeout=CALL_TIMEOUT_SECONDS,
        )
        people.show_profile(clients, answer, user, as_json=as_json)


@app.command(epilog=EXIT_CODES)
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


@app.command("verify-receipt", epilog=EXIT_CODES)
@reports_errors
def verify_receipt(
    file: Annotated[Path, typer.Argument(help="What `shopkeeper forget --json` printed.")],
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


@app.command(epilog=EXIT_CODES)
@reports_errors
def metrics(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show online metrics of the last seven days, by serving config."""
    installation = Installation.from_environment(home)
    with Clients(installation) as clients:
        answer = recommendations.metrics_by_serving_config(clients)
    simulated = Path(simulation.scale_path(installation)).exists()
    recommendations.show_metrics(answer, as_json=as_json, label=f"{simulation.LABEL}: " if simulated else "")


@app.command(epilog=EXIT_CODES)
@reports_errors
def doctor(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Say what is wrong with this installation, and how to mend it."""
    findings = doctor_checks.examine(Installation.from_environment(home))
    raise typer.Exit(doctor_checks.show_findings(findings, as_json=as_json))


@app.command(epilog=EXIT_CODES)
@reports_errors
def certs(
    out: Annotated[
        Path, typer.Option("--out", help="Directory of the authority and of the certificates.")
    ] = Path("certs"),
    trust_domain: Annotated[str, typer.Option("--trust-domain", help="Of the SPIFFE ids.")] = TRUST_DOMAIN,
    days: Annotated[int, typer.Option("--days", min=1, max=825, help="Validity of the certificates.")] = 90,
    host: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--host", help="One more name or address of the services; may be repeated.", show_default=False
        ),
    ] = None,
) -> None:
    """Make a certificate authority for development, and a certificate for each identity of the shipped policy.

    Run it again to renew: the authority stays, running services take the new files without a restart. In
    production let an issuer such as cert-manager do this.
    """
    for directory in issue_certificates(out, trust_domain=trust_domain, days=days, hosts=host or ()):
        say(f"{directory}: tls.crt, tls.key, ca.crt")
    say(
        f"Valid for {days} days. A service takes one with SHOPKEEPER_TLS={out}/<name>; keep {out}/ca/ca.key to yourself."
    )


@app.command(epilog=EXIT_CODES)
@reports_errors
def prepare(
    out: Annotated[Path, typer.Option("--out", help="Directory of keys, certificates and DATABASE_URL.")],
    password_file: Annotated[Path, typer.Option("--password-file", help="Password of the database's login.")],
    database: Annotated[
        str, typer.Option("--database", help="user@host:port/name.")
    ] = "shopkeeper@postgres:5432/shopkeeper",
    host: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--host", help="One more name or address of the services; may be repeated.", show_default=False
        ),
    ] = None,
) -> None:
    """Make the secrets of a suite of containers, as files, for development. What there is stays; certificates are renewed."""
    for path in prepare_secrets(out, password_file, database=database, hosts=host or []):
        say(str(path))


@app.command(epilog=EXIT_CODES)
@reports_errors
def demo(
    data: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A directory of real data. Default: a simulation.", show_default=False),
    ] = None,
    mapping: Annotated[
        str | None, typer.Option(help="Mapping of the data. Default: the one that fits.")
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="End by itself; exit code 1 when the loop does not hold.")
    ] = False,
    home: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--home",
            help=f"Home directory. Default: SHOPKEEPER_HOME, else ./{DEMO_HOME}. Erased first if a demo made it.",
            show_default=False,
        ),
    ] = None,
    first_port: FirstPortOption = None,
) -> None:
    """The whole loop on this machine: events in, a model trained, recommendations out. Starts afresh each time."""
    chosen = home or Path(os.environ.get("SHOPKEEPER_HOME") or DEMO_HOME)
    raise typer.Exit(run_demo(chosen, data, mapping, once=once, first_port=first_port))


def main() -> None:
    """Runs the command line; the exit codes are those in --help."""
    # A library of the embedded PostgreSQL warns about a variable that it does not need.
    warnings.filterwarnings("ignore", module="platformdirs")
    try:
        app()
    except ShopkeeperError as error:  # A setting that is read before a command begins.
        print(f"error {error.message}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
