"""One installation on one machine: its home directory, its addresses, and what is running in it."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from shared.errors import FailedPrecondition
from shared.settings import ServiceSettings, load_settings

SERVICES = ("feedback", "profile", "trainer", "recommend")
FIRST_PORT = 7001
METRICS_OFFSET = 100


@dataclass(frozen=True, slots=True)
class RunState:
    """What `up` has started; in <home>/run/state.json while it runs."""

    supervisor_pid: int
    addresses: dict[str, str]
    metrics_ports: dict[str, int]
    service_pids: dict[str, int]
    database: str
    started_at: float
    ready: bool = False


class Installation:
    """Paths and addresses. A suite that is up tells its own addresses; else the settings do."""

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()

    @classmethod
    def from_environment(cls, home: Path | None = None) -> Installation:
        """Returns the installation at `home`, else at SHOPKEEPER_HOME, else at ./.shopkeeper."""
        return cls(home or load_settings(ServiceSettings).home)

    @property
    def state_path(self) -> Path:
        return self.home / "run" / "state.json"

    @property
    def logs(self) -> Path:
        return self.home / "log"

    @property
    def keys(self) -> Path:
        return load_settings(ServiceSettings).keys or self.home / "keys"

    @property
    def registry(self) -> Path:
        return load_settings(ServiceSettings).registry or self.home / "registry"

    def running(self) -> RunState | None:
        """Returns the state of the suite that runs here, or None."""
        state = self._state()
        return state if state is not None and process_alive(state.supervisor_pid) else None

    def end_leftovers(self) -> list[str]:
        """Ends services whose supervisor was killed before it could; returns their names."""
        state = self._state()
        if state is None or process_alive(state.supervisor_pid):
            return []
        # A process id may have gone to another program since: its command line tells.
        left = {name: pid for name, pid in state.service_pids.items() if _runs_service(pid, name)}
        for signal_number, patience_seconds in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
            for name, pid in left.items():
                if _runs_service(pid, name):
                    os.kill(pid, signal_number)
            deadline = time.monotonic() + patience_seconds
            while any(_runs_service(pid, name) for name, pid in left.items()) and time.monotonic() < deadline:
                time.sleep(0.1)
        return list(left)

    def _state(self) -> RunState | None:
        try:
            return RunState(**json.loads(self.state_path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write_state(self, state: RunState) -> None:
        """Writes the state by an atomic rename, readable by the owner only."""
        self.prepare()
        staged = self.state_path.with_suffix(f".{os.getpid()}")
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(state), file)
        staged.replace(self.state_path)

    def clear_state(self) -> None:
        """Says that nothing runs here any more."""
        self.state_path.unlink(missing_ok=True)

    def prepare(self) -> None:
        """Creates the directories.

        Raises:
            FailedPrecondition: HOME_UNUSABLE.
        """
        try:
            for directory in (self.home, self.state_path.parent, self.logs):
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise FailedPrecondition(
                "HOME_UNUSABLE",
                f"The home directory {self.home} cannot be used: {error.strerror}. "
                "Choose another with --home or SHOPKEEPER_HOME.",
            ) from error

    def addresses(self) -> dict[str, str]:
        """Returns where each service answers."""
        state = self.running()
        return dict(state.addresses) if state else configured_addresses()


def configured_addresses(first_port: int | None = None) -> dict[str, str]:
    """Returns the addresses of the settings, or four ports from `first_port` on."""
    if first_port is not None:
        return {name: f"127.0.0.1:{first_port + i}" for i, name in enumerate(SERVICES)}
    settings = load_settings(ServiceSettings)
    return {name: str(getattr(settings, f"{name}_address")) for name in SERVICES}


def process_alive(pid: int) -> bool:
    """Returns whether a process exists and is no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return True


def _runs_service(pid: int, name: str) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\x00")
    except OSError:
        return False
    return f"services.{name}".encode() in words and process_alive(pid)


def port_is_free(address: str) -> bool:
    """Returns whether `host:port` can be listened on."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError:
            return False
    return True


def free_first_port(preferred: int = FIRST_PORT) -> int:
    """Returns the first port of a block of four (and their metrics ports) that is free, from `preferred` on."""
    for first in range(preferred, 60_000, 200):
        ports = [first + i for i in range(len(SERVICES))]
        if all(port_is_free(f"127.0.0.1:{p}") for port in ports for p in (port, port + METRICS_OFFSET)):
            return first
    raise FailedPrecondition(
        "PORT_TAKEN", "No free ports were found on 127.0.0.1. End some programs, then retry."
    )
