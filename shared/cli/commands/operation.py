"""Commands that run the suite on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from shared.cli import doctor as doctor_checks
from shared.cli.certs import TRUST_DOMAIN, issue_certificates
from shared.cli.commands.options import (
    FirstPortOption,
    HomeOption,
    JsonOption,
)
from shared.cli.demo import run_demo
from shared.cli.installation import Installation, configured_addresses, process_alive
from shared.cli.output import EXIT_PROBLEMS, reports_errors, say
from shared.cli.prepare import prepare_secrets
from shared.cli.supervisor import START_TIMEOUT_SECONDS, Supervisor
from shared.errors import FailedPrecondition

DEMO_HOME = Path(".shopkeeper-demo")


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


@reports_errors
def doctor(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Say what is wrong with this installation, and how to mend it."""
    findings = doctor_checks.examine(Installation.from_environment(home))
    raise typer.Exit(doctor_checks.show_findings(findings, as_json=as_json))


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
