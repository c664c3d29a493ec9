"""kill -9 at every step between receiving an event and acknowledging it.

`make verify-crash` sets SHOPKEEPER_CRASH_EVENTS to 100,000; without it a few thousand events do.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pyarrow
import pyarrow.parquet
import pytest
from shopkeeper.feedback.v1 import (
    event_kind_pb2,
    event_pb2,
    feedback_service_pb2,
    feedback_service_pb2_grpc,
    import_pb2,
)

from tests.feedback.conftest import DUPLICATE, REJECTED, STORED, eventually, uuid7
from tests.feedback.crashing_server import STEPS
from tests.feedback.history import History, anomalies
from tests.feedback.nursery import Nursery, alive

EVENTS = int(os.environ.get("SHOPKEEPER_CRASH_EVENTS", "2000"))
SHOPPERS = 4


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def new_event(rng: random.Random) -> event_pb2.Event:
    """Returns an event whose identity is also in a column that nothing derives from it: the item."""
    event_id = uuid7()
    event = event_pb2.Event(event_id=event_id, user_id=f"user {rng.randrange(50)}")
    if rng.random() < 0.1:
        event.review.item_id, event.review.text = event_id, "words"
    elif rng.random() < 0.02:
        event.rating.item_id, event.rating.stars = event_id, 99
    else:
        event.item_view.item_id = event_id
    return event


class Shoppers:
    """Callers that never give an event up: what nobody knows is sent again, to the next server."""

    def __init__(self, history: History, seed: int, count: int = SHOPPERS) -> None:
        self._history = history
        self._pending: list[list[event_pb2.Event]] = [[] for _ in range(count)]
        self._rngs = [random.Random(seed + number) for number in range(count)]

    def visit(self, port: int, *, until: Callable[[], bool], resend_only: bool = False) -> None:
        """Sends to one server until it dies or `until` says so."""
        threads = [
            threading.Thread(target=self._shop, args=(number, port, until, resend_only))
            for number in range(len(self._pending))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()

    def _shop(self, number: int, port: int, until: Callable[[], bool], resend_only: bool) -> None:
        history, rng = self._history, self._rngs[number]
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            record = feedback_service_pb2_grpc.FeedbackServiceStub(channel).RecordEvents
            while not until():
                batch = self._pending[number]
                if not batch:
                    if resend_only:
                        return
                    batch = [new_event(rng) for _ in range(rng.choice((1, 5, 20)))]
                ids = [event.event_id for event in batch]
                self._pending[number] = batch
                history.invoke(ids)
                try:
                    answer = record(feedback_service_pb2.RecordEventsRequest(events=batch), timeout=20)
                except grpc.RpcError:
                    history.info(ids)
                    return
                self._pending[number] = []
                verdicts = [result.status for result in answer.results]
                assert set(verdicts) <= {STORED, DUPLICATE, REJECTED}
                history.ok(one for one, verdict in zip(ids, verdicts, strict=True) if verdict != REJECTED)
                history.fail(one for one, verdict in zip(ids, verdicts, strict=True) if verdict == REJECTED)


def stored_events(url: str) -> list[str]:
    with psycopg.connect(url) as connection:
        return [item for (item,) in connection.execute("SELECT item_id FROM feedback.events").fetchall()]


def visited_to_its_death(
    nursery: Nursery, shoppers: Shoppers, history: History, port: int, patience_events: int
) -> bool:
    """Sends until the server is dead; kills one that outlives the patience, and returns False then."""
    enough = len(history.acknowledged) + patience_events
    if port:
        shoppers.visit(port, until=lambda: len(history.acknowledged) >= enough)
    died = len(history.acknowledged) < enough
    if died:
        eventually(lambda: not alive(nursery.pid), 20)
    nursery.kill()
    return died


def sweep(
    nursery: Nursery,
    url: str,
    keys: Path,
    home: Path,
    steps: list[str],
    events: int,
    mistake: str | None = None,
) -> tuple[History, dict[str, set[str]], set[str]]:
    """Kills servers at the steps, in turn, until so many events are acknowledged and each step was met."""
    history, rng = History(), random.Random(4711)
    shoppers = Shoppers(history, 17)
    killed_at: set[str] = set()
    turn = 0
    while turn < len(steps) or len(history.acknowledged) < events:
        step = steps[turn % len(steps)]
        turn += 1
        hit = rng.randrange(1, 4) if step == "data keys made" else rng.randrange(2, 12 + events // 200)
        port = nursery.start(url, keys, home, step, hit, mistake)
        if visited_to_its_death(nursery, shoppers, history, port, 10 * events + 5_000):
            killed_at.add(step)
    # The last server lives: whatever nobody knows is asked for once more.
    shoppers.visit(nursery.start(url, keys, home, mistake=mistake), until=lambda: False, resend_only=True)
    nursery.kill(15)
    return history, anomalies(history, stored_events(url)), killed_at


@pytest.mark.slow
def test_no_step_at_which_the_server_is_killed_loses_invents_or_doubles_an_event(
    nursery: Nursery, database_url: str, keys_dir: Path, tmp_path: Path
) -> None:
    history, wrong, killed_at = sweep(nursery, database_url, keys_dir, tmp_path, list(STEPS), EVENTS)
    assert wrong == {}
    assert killed_at == set(STEPS)
    assert len(history.acknowledged) >= EVENTS
    # Without calls whose outcome nobody knew the sweep would have shown nothing.
    assert history.unknown
    assert history.refused
    print(
        f"{len(history.acknowledged)} events acknowledged, {len(history.unknown)} of unknown outcome in between"
    )


# libpq speaks by the first two, gRPC by the others.
CALLS = ("sendto", "recvfrom", "sendmsg", "recvmsg")


def die_at_system_call(pid: int, call: str, when: int, report: Path) -> subprocess.Popen[bytes]:
    """Lets strace kill a process inside of its n-th system call of a name; returns once it watches."""
    with report.open("wb") as stream:
        strace = subprocess.Popen(
            ["strace", "-f", "-o", "/dev/null", "-e", f"trace={call}", "-p", str(pid),
             "-e", f"inject={call}:signal=KILL:when={when}"],
            stderr=stream,
        )  # fmt: skip
    eventually(lambda: "attached" in report.read_text() or strace.poll() is not None)
    return strace


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not here")
def test_no_system_call_in_which_the_server_is_killed_loses_invents_or_doubles_an_event(
    nursery: Nursery, database_url: str, keys_dir: Path, tmp_path: Path
) -> None:
    history, rng = History(), random.Random(42)
    shoppers = Shoppers(history, 23)
    killed = []
    for turn in range(len(CALLS) * max(1, EVENTS // 5_000)):
        call = CALLS[turn % len(CALLS)]
        port = nursery.start(database_url, keys_dir, tmp_path)
        strace = die_at_system_call(nursery.pid, call, rng.randrange(3, 60), tmp_path / "strace.log")
        if "attached" not in (tmp_path / "strace.log").read_text():
            nursery.kill()
            pytest.skip(f"strace may not watch other processes here: {(tmp_path / 'strace.log').read_text()}")
        if visited_to_its_death(nursery, shoppers, history, port, 5_000):
            killed.append(call)
        strace.wait(10)
    shoppers.visit(nursery.start(database_url, keys_dir, tmp_path), until=lambda: False, resend_only=True)
    nursery.kill(15)
    assert anomalies(history, stored_events(database_url)) == {}
    assert set(killed) == set(CALLS)
    assert history.unknown


def test_the_checker_catches_an_acknowledgement_before_the_commit(
    nursery: Nursery, database_url: str, keys_dir: Path, tmp_path: Path
) -> None:
    _, wrong, _ = sweep(
        nursery, database_url, keys_dir, tmp_path, ["to be inserted"], 50, "acknowledge before commit"
    )
    assert "lost" in wrong


def test_the_checker_catches_deduplication_in_memory(
    nursery: Nursery, database_url: str, keys_dir: Path, tmp_path: Path
) -> None:
    _, wrong, _ = sweep(nursery, database_url, keys_dir, tmp_path, ["committed"], 50, "deduplicate in memory")
    assert "twice" in wrong


def test_the_checker_tells_each_anomaly_by_its_name() -> None:
    history = History()
    history.invoke({"a", "b", "c", "d"})
    history.ok({"a", "b"})
    history.fail({"c"})
    history.info({"d"})
    assert anomalies(history, ["a", "b"]) == anomalies(history, ["a", "b", "d"]) == {}
    assert anomalies(history, ["a", "c", "d", "d", "e"]) == {
        "lost": {"b"},
        "invented": {"e"},
        "stored although refused": {"c"},
        "twice": {"d"},
    }


def write_views(path: Path, rows: int) -> None:
    """Writes views, of which one row in the middle has no shopper."""
    table = {
        "who": ["" if i == rows // 2 else f"user {i % 97}" for i in range(rows)],
        "what": [f"item {i}" for i in range(rows)],
        "when": [1_700_000_000 + i for i in range(rows)],
    }
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(table), path, row_group_size=700)
        return
    lines = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        path.write_text(
            "who,what,when\n" + "".join(",".join(map(str, line.values())) + "\n" for line in lines)
        )


@pytest.mark.parametrize("name", ["views.csv", "views.jsonl", "views.parquet"])
def test_an_import_that_is_killed_again_and_again_stores_every_row_once(
    nursery: Nursery, database_url: str, keys_dir: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "imports").mkdir()
    rows = 6_000
    write_views(tmp_path / "imports" / name, rows)
    mapping = import_pb2.ColumnMapping(
        user_id_column="who", occurred_at_column="when", occurred_at_format="epoch_seconds", item_id_column="what",
        default_kind=event_kind_pb2.EVENT_KIND_ITEM_VIEW,
    )  # fmt: skip
    request = feedback_service_pb2.ImportEventsRequest(
        source=import_pb2.ImportSource(path=name, mapping=mapping), request_id="the one"
    )

    def call(port: int, method: str, request: Any) -> Any:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            return getattr(feedback_service_pb2_grpc.FeedbackServiceStub(channel), method)(
                request, timeout=20
            )

    port = nursery.start(database_url, keys_dir, tmp_path, "part to be settled", 3)
    import_id = call(port, "ImportEvents", request).import_id
    assert nursery.wait() == 9
    for step, hit in (("part settled", 3), ("to be inserted", 2), ("import to be finished", 1)):
        nursery.start(database_url, keys_dir, tmp_path, step, hit)
        assert nursery.wait() == 9
    port = nursery.start(database_url, keys_dir, tmp_path)
    wanted = feedback_service_pb2.GetImportRequest(import_id=import_id)
    last = eventually(lambda: (one := call(port, "GetImport", wanted)).HasField("end_time") and one, 60)
    nursery.kill(15)
    assert last.state == import_pb2.IMPORT_STATE_SUCCEEDED
    # What became of each row is told once, though parts of the file were sent again and again.
    assert last.read_row_count == last.total_row_count == rows
    assert (last.stored_count + last.duplicate_count, last.rejected_count) == (rows - 1, 1)
    (sample,) = last.error_samples
    assert sample.row_number == rows // 2 + 1
    assert sorted(stored_events(database_url)) == sorted(f"item {i}" for i in range(rows) if i != rows // 2)
