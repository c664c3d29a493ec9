"""Servers that can be killed, forked from one process that has imported everything: ready in half a second."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.feedback.conftest import eventually

REPOSITORY = Path(__file__).resolve().parents[2]


class Nursery:
    """Forks servers that die."""

    def __init__(self) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.feedback.crashing_server"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._pid = 0

    def start(
        self,
        url: str,
        keys: Path,
        home: Path,
        step: str | None = None,
        hit: int = 1,
        mistake: str | None = None,
        **settings: str,
    ) -> int:
        """Starts a server; returns its port, or 0 when it died before it was ready."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        log = home / "server.log"
        log.unlink(missing_ok=True)
        environment = {
            "DATABASE_URL": url,
            "SHOPKEEPER_HOME": str(home),
            "SHOPKEEPER_KEYS": str(keys),
            "SHOPKEEPER_LISTEN": "127.0.0.1:0",
            "SHOPKEEPER_AUTO_MIGRATE": "false",
            "SHOPKEEPER_BOT_VIEWS_PER_MINUTE": "1000000000",
            **settings,
        }
        order = {"environment": environment, "log": str(log), "step": step, "hit": hit, "mistake": mistake}
        self._parent.stdin.write(json.dumps(order) + "\n")
        self._parent.stdin.flush()
        self._pid = int(self._parent.stdout.readline())

        def ready() -> re.Match[str] | bool | None:
            text = log.read_text() if log.exists() else ""
            return re.search(r"feedback ready on 127\.0\.0\.1:(\d+)", text) or not alive(self._pid)

        found = eventually(ready, 60)
        return int(found[1]) if isinstance(found, re.Match) else 0

    @property
    def pid(self) -> int:
        """The process of the present server."""
        return self._pid

    def wait(self) -> int:
        """Waits until the server is gone; returns the signal that killed it, 0 for none."""
        assert self._parent.stdout is not None
        return os.WTERMSIG(int(self._parent.stdout.readline()))

    def kill(self, number: int = 9) -> int:
        if alive(self._pid):
            os.kill(self._pid, number)
        return self.wait()

    def close(self) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        try:
            self._parent.wait(10)
        except subprocess.TimeoutExpired:
            os.kill(self._pid, 9)
            self._parent.wait(10)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
