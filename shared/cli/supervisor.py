"""Four service processes and, without DATABASE_URL, a PostgreSQL: started, watched, restarted, drained."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psycopg

from shared import embedded_postgres
from shared.cli.clients import health_of
from shared.cli.installation import METRICS_OFFSET, SERVICES, Installation, RunState, port_is_free
from shared.cli.output import say
from shared.database import ensure_database
from shared.errors import FailedPrecondition, Unavailable
from shared.keys import ensure_development_keys
from shared.settings import ServiceSettings, load_settings

START_TIMEOUT_SECONDS = 90.0
POLL_SECONDS = 0.1
FIRST_BACK_OFF_SECONDS = 0.5
MAX_BACK_OFF_SECONDS = 15.0
STEADY_SECONDS = 30.0
STARTS_THAT_MAY_FAIL = 3
LOG_LINES_SHOWN = 8
DATABASE_CHECK_SECONDS = 5.0


@dataclass(slots=True)
class _Child:
    name: str
    process: subprocess.Popen[bytes]
    started: float
    back_off: float = FIRST_BACK_OFF_SECONDS
    restart_at: float | None = None
    failures: int = 0
    was_ready: bool = False


class Supervisor:
    """Owns the processes of one installation, from `start` to `stop`.

    Args:
        installation: where everything lies.
        addresses: `host:port` of each service.
        report: told what happens, a line at a time.
    """

    def __init__(
        self, installation: Installation, addresses: dict[str, str], report: Callable[[str], None] = say
    ) -> None:
        self._installation = installation
        self._addresses = addresses
        self._report = report
        self._children: dict[str, _Child] = {}
        self._database_url = ""
        self._embedded = False
        self._started_at = time.time()
        self._stop = threading.Event()
        self._next_database_check = 0.0

    @property
    def addresses(self) -> dict[str, str]:
        return dict(self._addresses)

    @property
    def is_stopping(self) -> bool:
        return self._stop.is_set()

    def start(self) -> None:
        """Starts everything and waits until every service is ready, or until `request_stop`.

        Raises:
            FailedPrecondition: ALREADY_UP, PORT_TAKEN, KEY_MISSING, DATABASE_NOT_STARTED, HOME_UNUSABLE,
                SERVICE_FAILED (with the last lines of its log).
            Unavailable: the database of DATABASE_URL, or a service, was not ready in time.
        """
        self.check_free()
        self._installation.prepare()
        self._report(
            f"Starting Shopkeeper in {self._installation.home}; logs are in {self._installation.logs}"
        )
        created = ensure_development_keys(self._installation.keys)
        if created:
            self._report(f"Created development keys in {self._installation.keys}: {', '.join(created)}")
        self._open_database()
        for name in SERVICES:
            self._children[name] = _Child(name, self._spawn(name), time.monotonic())
        self._write_state(ready=False)
        self._wait_until_ready()
        if not self.is_stopping:
            self._write_state(ready=True)

    def check_free(self) -> None:
        """Checks that nothing of the kind runs yet.

        Raises:
            FailedPrecondition: ALREADY_UP or PORT_TAKEN.
        """
        running = self._installation.running()
        if running is not None and running.supervisor_pid != os.getpid():
            raise FailedPrecondition(
                "ALREADY_UP",
                f"The suite in {self._installation.home} is up already (process {running.supervisor_pid}). "
                "End it with `shopkeeper down`, or choose another --home.",
            )
        leftovers = self._installation.end_leftovers()
        if leftovers:
            self._report(f"Ended {', '.join(leftovers)}, left over from a supervisor that was killed.")
        for name, address in self._addresses.items():
            host, _, port = address.rpartition(":")
            for number in (int(port), int(port) + METRICS_OFFSET):
                if not port_is_free(f"{host}:{number}"):
                    raise FailedPrecondition(
                        "PORT_TAKEN",
                        f"Port {number} on {host}, which {name} needs, is taken{_taken_by(number)}. End that program, "
                        "or choose other ports with --first-port.",
                        {"port": str(number)},
                    )

    def watch(self) -> None:
        """Restarts what crashes until `request_stop`; returns then.

        Raises:
            FailedPrecondition: a service failed again and again before it was ever ready.
        """
        while not self._stop.wait(POLL_SECONDS):
            self.tend()

    def tend(self) -> None:
        """Looks after every process once."""
        now = time.monotonic()
        changed = False
        for child in self._children.values():
            if child.restart_at is not None:
                if now >= child.restart_at:
                    child.restart_at = None
                    child.process, child.started = self._spawn(child.name), now
                    changed = True
                continue
            status = child.process.poll()
            if status is None:
                if now - child.started > STEADY_SECONDS:
                    child.back_off, child.failures = FIRST_BACK_OFF_SECONDS, 0
                continue
            child.failures += 1
            if (not child.was_ready and child.failures >= STARTS_THAT_MAY_FAIL) or (
                status == 2 and not child.was_ready
            ):
                raise FailedPrecondition(
                    "SERVICE_FAILED",
                    f"{child.name} ended with code {status}. Its log {self._log(child.name)} ends:\n"
                    + _tail(self._log(child.name)),
                    {"service": child.name},
                )
            self._report(f"{child.name} ended with code {status}; it starts again in {child.back_off:.1f} s.")
            child.restart_at = now + child.back_off
            child.back_off = min(2 * child.back_off, MAX_BACK_OFF_SECONDS)
        if self._embedded and now >= self._next_database_check:
            self._next_database_check = now + DATABASE_CHECK_SECONDS
            self._revive_database()
        if changed:
            self._write_state(ready=True)

    def request_stop(self) -> None:
        """Makes `watch` return."""
        self._stop.set()

    def stop(self) -> None:
        """Drains the services, all at once, then stops the database. Calling it again does nothing."""
        self._stop.set()
        grace = load_settings(ServiceSettings).drain_seconds + 10
        for child in self._children.values():
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + grace
        for child in self._children.values():
            try:
                child.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._report(f"{child.name} did not end within {grace:.0f} s and was killed.")
                child.process.kill()
                child.process.wait()
        self._children.clear()
        if self._embedded:
            embedded_postgres.stop(self._installation.home)
            self._embedded = False
        state = self._installation.running()
        if state is not None and state.supervisor_pid == os.getpid():
            self._installation.clear_state()

    def _open_database(self) -> None:
        url = load_settings(ServiceSettings).database_url
        if url is None:
            self._embedded = True
            self._database_url = embedded_postgres.start(self._installation.home)
        else:
            self._database_url = url
        try:
            ensure_database(self._database_url)
        except (psycopg.OperationalError, Unavailable) as error:
            cause = error.__cause__ if isinstance(error, Unavailable) and error.__cause__ else error
            raise Unavailable(
                "DATABASE_UNREACHABLE",
                f"The database cannot be reached: {str(cause).splitlines()[0]}. "
                "Check DATABASE_URL (postgresql://user:password@host:port/database) and that the server runs.",
            ) from error

    def _revive_database(self) -> None:
        try:
            psycopg.connect(self._database_url, connect_timeout=5).close()
        except psycopg.OperationalError:
            self._report("The embedded PostgreSQL is away; it is being started again.")
            try:
                embedded_postgres.stop(self._installation.home)
            except Exception as error:
                self._report(f"Its remains could not be cleared away: {error}")
            try:
                self._database_url = embedded_postgres.start(self._installation.home)
            except FailedPrecondition as error:
                self._report(error.message)

    def _spawn(self, name: str) -> subprocess.Popen[bytes]:
        host, _, port = self._addresses[name].rpartition(":")
        del host
        environment = {
            # On one machine, unless certificates are configured: plain text on loopback, and said so.
            **({} if load_settings(ServiceSettings).tls else {"INSECURE": "1"}),
            **os.environ,
            "SHOPKEEPER_HOME": str(self._installation.home),
            "SHOPKEEPER_LISTEN": self._addresses[name],
            "SHOPKEEPER_METRICS_PORT": str(int(port) + METRICS_OFFSET),
            "DATABASE_URL": self._database_url,
            "PYTHONUNBUFFERED": "1",
            **{f"SHOPKEEPER_{other.upper()}_ADDRESS": self._addresses[other] for other in SERVICES},
        }
        with self._log(name).open("ab") as log:
            # A session of its own: Ctrl-C reaches the supervisor alone, which then drains in order.
            return subprocess.Popen(
                [sys.executable, "-m", f"services.{name}"],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        waiting = list(SERVICES)
        last: dict[str, str] = {}
        while waiting and not self._stop.is_set():
            self.tend()
            for name in list(waiting):
                last[name] = health_of(self._addresses[name], 1.0)
                if last[name] == "SERVING":
                    self._children[name].was_ready = True
                    waiting.remove(name)
            if time.monotonic() > deadline:
                name = waiting[0]
                raise Unavailable(
                    "SERVICE_NOT_READY",
                    f"{name} was not ready within {START_TIMEOUT_SECONDS:.0f} s ({last[name]}). "
                    f"Its log {self._log(name)} ends:\n{_tail(self._log(name))}",
                )
            if waiting:
                self._stop.wait(POLL_SECONDS)

    def _write_state(self, *, ready: bool) -> None:
        self._installation.write_state(
            RunState(
                supervisor_pid=os.getpid(),
                addresses=self._addresses,
                metrics_ports={
                    n: int(a.rpartition(":")[2]) + METRICS_OFFSET for n, a in self._addresses.items()
                },
                service_pids={child.name: child.process.pid for child in self._children.values()},
                database="embedded" if self._embedded else "DATABASE_URL",
                started_at=self._started_at,
                ready=ready,
            )
        )

    def _log(self, name: str) -> Path:
        return self._installation.logs / f"{name}.log"


def _taken_by(port: int) -> str:
    try:
        import psutil
    except ImportError:
        return ""
    try:
        for connection in psutil.net_connections("inet"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr
            if listens and tuple(connection.laddr)[1:2] == (port,) and connection.pid:
                return f" by process {connection.pid} ({psutil.Process(connection.pid).name()})"
    except psutil.Error:
        pass
    return ""


def _tail(path: Path) -> str:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return "(no log)"
    return "\n".join(f"  {line[:400]}" for line in lines[-LOG_LINES_SHOWN:])
