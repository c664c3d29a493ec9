"""The feedback service that dies at a chosen step: `python -m tests.feedback.crashing_server`.

A parent imports everything once and forks a server for each line of JSON on stdin:

    {"environment": {...}, "log": path, "step": name or null, "hit": n, "mistake": name or null}

It answers with the pid, and later, when that server is gone, with its exit status. The service itself knows
nothing of this: functions are wrapped here. At its n-th passage through a step the process kills itself, as
`kill -9` would: no handler runs, nothing is flushed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable
from typing import Any

import psycopg

from services.feedback import __main__ as service
from services.feedback import recording
from services.feedback.converters import results
from services.feedback.converters.events import EventReader
from services.feedback.domain.events import Appended, AppendVerdict, EventColumns, key_column
from services.feedback.storage import log_writer
from services.feedback.storage.group_commit import GroupCommitLog
from services.feedback.storage.imports import PostgresImports
from services.feedback.storage.log_writer import LogWriter
from shared.deferred_calls import DeferredCall

# Step → owner of a function, its name, and whether to die before or after it.
STEPS: dict[str, tuple[Any, str, str]] = {
    "received": (EventReader, "read_requests", "before"),
    "read": (EventReader, "read_requests", "after"),
    "to be queued": (GroupCommitLog, "append", "before"),
    "queued": (GroupCommitLog, "append", "after"),
    "taken from the queue": (GroupCommitLog, "_commit", "before"),
    "to be inserted": (LogWriter, "_insert", "before"),
    "data keys made": (LogWriter, "_encrypted", "after"),
    "inserted, not committed": (psycopg.Connection, "execute", "before commit"),
    "commit sent": (psycopg.Connection, "execute", "after commit"),
    "committed": (LogWriter, "_insert", "after"),
    "verdicts found": (LogWriter, "append", "after"),
    "to be answered": (GroupCommitLog, "_answer", "before"),
    "answered inside": (GroupCommitLog, "_answer", "after"),
    "settled": (recording, "settled", "after"),
    "token signed": (results, "to_consistency_token", "after"),
    "responses made": (recording, "to_record_events_responses", "after"),
    "to be sent": (DeferredCall, "answer", "before"),
    "sent": (DeferredCall, "answer", "after"),
}
IMPORT_STEPS: dict[str, tuple[Any, str, str]] = {
    "part to be settled": (PostgresImports, "checkpoint", "before"),
    "part settled": (PostgresImports, "checkpoint", "after"),
    "import to be finished": (PostgresImports, "finish", "before"),
}


class Fuse:
    """Kills the process at its n-th passage."""

    def __init__(self, hits: int) -> None:
        self._left = hits
        self._lock = threading.Lock()

    def burn(self) -> None:
        with self._lock:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


def arm(step: str, hits: int) -> None:
    """Wraps the function of a step."""
    owner, name, when = (STEPS | IMPORT_STEPS)[step]
    original: Callable[..., Any] = getattr(owner, name)
    fuse = Fuse(hits)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        relevant = "commit" not in when or arguments[1] == "COMMIT"
        if relevant and when.startswith("before"):
            fuse.burn()
        result = original(*arguments, **keywords)
        if relevant and when.startswith("after"):
            fuse.burn()
        return result

    # A static method stays one.
    static = isinstance(vars(owner).get(name), staticmethod)
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)


# Mistakes that a checker worth its name must notice.


def acknowledge_before_commit() -> None:
    """Answers at once, and commits behind the caller's back."""
    queue_rows = GroupCommitLog.append

    def append(self: GroupCommitLog, columns: EventColumns, callers: Any = None) -> Any:
        queued = queue_rows(self, columns, callers)
        answer: Any = type(queued)()
        answer.set_result(Appended(1, {}))
        return answer

    GroupCommitLog.append = append  # type: ignore[method-assign]


def deduplicate_in_memory() -> None:
    """Remembers what it stored, and stores under keys of its own: right, until it is restarted."""
    insert = LogWriter.append
    seen: set[bytes] = set()

    def append(self: LogWriter, columns: EventColumns) -> Appended:
        keys = columns.column("event_key").tolist()
        again = {row: AppendVerdict.DUPLICATE for row, key in enumerate(keys) if key in seen}
        fresh = [key[:6] + uuid.uuid4().bytes[6:] for key in keys]
        appended = insert(self, EventColumns((key_column(fresh), *columns.dense[1:]), columns.sparse))
        seen.update(keys)
        return Appended(appended.xid, again)

    LogWriter.append = append  # type: ignore[method-assign]


def trust_any_server() -> None:
    """Believes that whatever PostgreSQL commits is durable."""
    log_writer.verify_durability = service.verify_durability = lambda _connection: None  # type: ignore[assignment]


MISTAKES = {
    "trust any server": trust_any_server,
    "acknowledge before commit": acknowledge_before_commit,
    "deduplicate in memory": deduplicate_in_memory,
}


def _become_server(order: dict[str, Any]) -> None:
    os.environ.update(order["environment"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["mistake"]:
        MISTAKES[order["mistake"]]()
    if order["step"]:
        arm(order["step"], order["hit"])
    sys.argv = ["services.feedback", "serve"]
    service.main()


def main() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                _become_server(order)
                status = 0
            finally:
                os._exit(status)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


if __name__ == "__main__":
    main()
