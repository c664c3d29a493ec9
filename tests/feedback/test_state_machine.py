"""The log against a dict: whatever is recorded, repeated, contradicted, cut off, erased and restored, in any order.

The dict holds what was acknowledged of people who were not forgotten. After every step the log must hold just that,
once and with its payload, as `ExportUser` tells it; of calls without an answer it may hold either.
`make verify-histories` sets SHOPKEEPER_STATE_MACHINE_EXAMPLES to 200.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg import sql
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, feedback_service_pb2_grpc

from services.feedback.__main__ import Feedback, finish_erasures, move_tombstones, wire
from services.feedback.servicer import SERVICE_NAME
from services.feedback.settings import FeedbackSettings
from services.feedback.storage.log_writer import LogWriter
from services.feedback.storage.partitions import WRITERS_LOCK
from services.feedback.storage.people import PostgresPeople
from shared.server import GrpcServer
from shared.telemetry import Telemetry
from tests.feedback.conftest import DUPLICATE, REJECTED, STORED, eventually, uuid7

EXAMPLES = int(os.environ.get("SHOPKEEPER_STATE_MACHINE_EXAMPLES", "4"))
STEPS = 25
KINDS = ("item_view", "review", "purchase")
MOMENTS = ("before the commit", "after the commit", "whenever")
PEOPLE = ("ada", "bob", "cem", "dee", "eve")
FORGOTTEN = event_pb2.EVENT_REASON_USER_FORGOTTEN
CONFLICT = event_pb2.EVENT_REASON_PAYLOAD_CONFLICT

Events = Sequence[event_pb2.Event]
_numbers = itertools.count()


def new_event(person: str, kind: str, has_uuid: bool) -> event_pb2.Event:
    """Returns an event that no other equals: the item tells which it is."""
    number = next(_numbers)
    event = event_pb2.Event(event_id=uuid7() if has_uuid else f"order-{number}", user_id=person)
    if not has_uuid:
        event.occurred_at.FromSeconds(1_770_000_000 + number)
    item_id = f"item-{number}"
    if kind == "item_view":
        event.item_view.item_id, event.item_view.dwell_seconds = item_id, 1.0 + number % 100
    elif kind == "review":
        event.review.item_id, event.review.text = item_id, f"words about {item_id}"
    else:
        event.purchase.currency_code = "EUR"
        for line in range(2):
            event.purchase.lines.add(
                item_id=f"{item_id}.{line}", quantity=1.0 + line, price_micros=1_000 + number
            )
    return event


def told(event: event_pb2.Event) -> str:
    """Returns what the export tells of an event, apart from its key and its times."""
    kind = event.WhichOneof("detail")
    if kind == "item_view":
        line = {
            "kind": "ITEM_VIEW",
            "item_id": event.item_view.item_id,
            "value": event.item_view.dwell_seconds,
        }
    elif kind == "review":
        line = {"kind": "REVIEW", "item_id": event.review.item_id, "text": event.review.text}
    else:
        lines = [
            {"item_id": one.item_id, "quantity": one.quantity, "price_micros": one.price_micros}
            for one in event.purchase.lines
        ]
        line = {"kind": "PURCHASE", "currency_code": "EUR", "lines": lines}
    return json.dumps(line, sort_keys=True)


@st.composite
def batches(draw: st.DrawFn) -> list[event_pb2.Event]:
    """Some new events; now and then one of them stands there twice."""
    specs = draw(
        st.lists(
            st.tuples(st.sampled_from(PEOPLE), st.sampled_from(KINDS), st.booleans()),
            min_size=1,
            max_size=4,
        )
    )
    events = [new_event(*spec) for spec in specs]
    return [*events, events[0]] if draw(st.booleans()) else events


class Service:
    """The service as its program wires it, on a socket."""

    def __init__(self, settings_: FeedbackSettings, url: str) -> None:
        self.feedback: Feedback = wire(settings_, url)
        self._server = GrpcServer(
            "feedback", settings_, Telemetry("feedback", settings_),
            register=[self.feedback.register], service_names=(SERVICE_NAME,),
        )  # fmt: skip
        self._server.start()
        self._server.set_ready(True)
        # A client that tries again by itself would hide what came of a call.
        self._channel = grpc.insecure_channel(
            f"127.0.0.1:{self._server.port}", options=[("grpc.enable_retries", 0)]
        )
        self.stub = feedback_service_pb2_grpc.FeedbackServiceStub(self._channel)
        # As the program does first of all.
        self.feedback.people.finish_erasures()

    def dispose(self) -> None:
        """Frees what a dead process would not hold; nothing waits in it any more."""
        self._channel.close()
        self._server.stop(0)
        self.feedback.close()


class LogAgainstDict(RuleBasedStateMachine):
    """The log, the dict, and what a shop does to both."""

    def __init__(self, new_database: Callable[[], Any], keys: Path, home: Path) -> None:
        super().__init__()
        self._database = new_database()
        self._url = self._database.__enter__()
        self._settings = FeedbackSettings(
            listen="127.0.0.1:0", log_level="error", keys=keys, registry=home / "registry",
            import_directory=home / "imports", database_url=self._url,
        )  # fmt: skip
        self._sql = psycopg.connect(self._url, autocommit=True)
        self._service = Service(self._settings, self._url)
        self._sent: list[event_pb2.Event] = []
        self._acknowledged: dict[str, event_pb2.Event] = {}
        self._unknown: dict[str, event_pb2.Event] = {}
        self._forgotten: set[str] = set()
        self._dump: tuple[dict[str, event_pb2.Event], dict[str, event_pb2.Event]] = ({}, {})

    def teardown(self) -> None:
        self._service.dispose()
        self._sql.close()
        self._database.__exit__(None, None, None)

    # What shops do

    @initialize(kinds=st.lists(st.sampled_from(KINDS), min_size=len(PEOPLE), max_size=len(PEOPLE)))
    def open_the_shop(self, kinds: Sequence[str]) -> None:
        """Everybody is in the first dump: whoever is forgotten later would come back with it."""
        self._send([new_event(person, kind, True) for person, kind in zip(PEOPLE, kinds, strict=True)])
        self.dump()

    @rule(batch=batches())
    def record(self, batch: Events) -> None:
        self._send(batch)

    @rule(batch=batches())
    def record_in_two_calls_at_once(self, batch: Events) -> None:
        self._sent.extend(batch)
        calls = [self._call(batch), self._call(batch)]
        answers = [call.result().results for call in calls]
        for event in {event.event_id: event for event in batch}.values():
            statuses = Counter(
                result.status
                for results in answers
                for sent, result in zip(batch, results, strict=True)
                if sent.event_id == event.event_id
            )
            if event.user_id in self._forgotten:
                assert set(statuses) == {REJECTED}
            else:
                assert statuses[STORED] == 1
                assert set(statuses) == {STORED, DUPLICATE}
                self._acknowledged[event.event_id] = event

    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        self.send_again(self._drawn(data))

    @rule(data=st.data(), thief=st.sampled_from(PEOPLE))
    def contradict(self, data: st.DataObject, thief: str) -> None:
        """The ids of earlier events with other content, or in the name of somebody else."""
        events = []
        for event in map(self._sent.__getitem__, self._drawn(data)):
            other = event_pb2.Event()
            other.CopyFrom(event)
            if event.user_id == thief:
                number = next(_numbers)
                if other.HasField("purchase"):
                    other.purchase.lines[0].price_micros += 1 + number
                elif other.HasField("review"):
                    other.review.text += f", and {number}"
                else:
                    other.item_view.item_id += f"-{number}"
            other.user_id = thief
            events.append(other)
        self._send(events)

    # What befalls the service

    @rule()
    def crash(self) -> None:
        self._restart()

    @rule(batch=batches(), moment=st.sampled_from(MOMENTS))
    def crash_under_way(self, batch: Events, moment: str) -> None:
        self._sent.extend(batch)
        with {
            "before the commit": self._writers_held_up,
            "after the commit": _answers_of_commits_lost,
            "whenever": _nothing,
        }[moment]() as reached:
            call = self._call(batch)
            reached()
            self._cut_connections()
            error = call.exception()
        if error is None:
            self._judge(batch, call.result().results)
        else:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error
            self._unknown |= {
                event.event_id: event for event in batch if event.user_id not in self._forgotten
            }
        self._restart()

    # How people end

    @precondition(lambda self: len(self._forgotten) < len(PEOPLE) - 1)
    @rule(person=st.sampled_from(PEOPLE))
    def forget(self, person: str) -> None:
        receipt = self._service.stub.ForgetUser(
            feedback_service_pb2.ForgetUserRequest(user_id=person), timeout=20
        )
        erased = {row.table: row.row_count for row in receipt.erased_rows}
        acknowledged = sum(event.user_id == person for event in self._acknowledged.values())
        unknown = sum(event.user_id == person for event in self._unknown.values())
        assert acknowledged <= erased["events"] <= acknowledged + unknown
        self._mourn(person)

    @precondition(lambda self: len(self._forgotten) < len(PEOPLE) - 1)
    @rule(person=st.sampled_from(PEOPLE), is_dumped=st.booleans())
    def forget_and_crash_half_way(self, person: str, is_dumped: bool) -> None:
        def die(*_: Any) -> None:
            raise psycopg.OperationalError("gone")

        with mock.patch.object(PostgresPeople, "_erase_rows", die), pytest.raises(grpc.RpcError):
            self._service.stub.ForgetUser(feedback_service_pb2.ForgetUserRequest(user_id=person), timeout=20)
        if is_dumped:
            self.dump()
        self._restart()
        self._mourn(person)

    # What operators do

    @rule()
    def dump(self) -> None:
        with self._sql.transaction():
            self._sql.execute("DROP SCHEMA IF EXISTS dump CASCADE")
            self._sql.execute("CREATE SCHEMA dump")
            for table in self._tables():
                self._sql.execute(
                    sql.SQL("CREATE TABLE dump.{0} AS SELECT * FROM feedback.{0}").format(
                        sql.Identifier(table)
                    )
                )
        self._dump = dict(self._acknowledged), dict(self._unknown)

    @rule(last=st.none() | st.sampled_from(PEOPLE), replays=st.integers(1, 2))
    def restore(self, last: str | None, replays: int) -> None:
        """Puts the dump back, which knows nothing of whom the last call of all forgot."""
        if last is not None and len(self._forgotten) < len(PEOPLE) - 1:
            self.forget(last)
        newest = self._tombstones("export-tombstones")
        self._cut_connections()
        self._service.dispose()
        with self._sql.transaction():
            for table in self._tables():
                name = sql.Identifier(table)
                self._sql.execute(sql.SQL("TRUNCATE feedback.{}").format(name))
                self._sql.execute(sql.SQL("INSERT INTO feedback.{0} SELECT * FROM dump.{0}").format(name))
        for _ in range(replays):
            self._tombstones("replay-tombstones", newest)
            with redirect_stdout(io.StringIO()):
                finish_erasures(self._settings)
        self._acknowledged, self._unknown = (self._of_the_living(events) for events in self._dump)
        self._service = Service(self._settings, self._url)

    # What must be true

    @invariant()
    def the_log_is_the_dict(self) -> None:
        total = 0
        for person in PEOPLE:
            parts = self._service.stub.ExportUser(
                feedback_service_pb2.ExportUserRequest(user_id=person), timeout=20
            )
            stored = Counter(
                json.dumps(
                    {
                        name: value
                        for name, value in line.items()
                        if name not in ("type", "event_key", "occurred_at", "received_at")
                    },
                    sort_keys=True,
                )
                for part in parts
                for line in map(json.loads, part.json_lines)
                if line["type"] == "event"
            )
            acknowledged = self._told(person, self._acknowledged)
            possible = acknowledged + self._told(person, self._unknown)
            assert acknowledged <= stored <= possible, (person, acknowledged - stored, stored - possible)
            total += stored.total()
        # Under whatever key: nobody else is there.
        row = self._sql.execute("SELECT count(*) FROM feedback.events").fetchone()
        assert row == (total,)

    @invariant()
    def nobody_forgotten_keeps_a_key(self) -> None:
        writers = {event.user_id for event in self._acknowledged.values() if event.HasField("review")}
        row = self._sql.execute("SELECT count(*) FROM feedback.data_keys").fetchone()
        assert row is not None
        # A key may be there of somebody whose text was refused as a contradiction, or was never acknowledged.
        assert len(writers) <= row[0] <= len(set(PEOPLE) - self._forgotten)

    # How it is done

    def send_again(self, places: Iterable[int]) -> None:
        """Anything that was ever sent: stored, of unknown outcome, lost by a restore, or of the forgotten."""
        self._send([self._sent[place] for place in places])

    @property
    def sent_count(self) -> int:
        return len(self._sent)

    def _send(self, events: Events) -> None:
        self._sent.extend(events)
        self._judge(events, self._call(events).result().results)

    def _call(self, events: Events) -> Any:
        return self._service.stub.RecordEvents.future(
            feedback_service_pb2.RecordEventsRequest(events=events), timeout=20
        )

    def _judge(self, events: Events, results: Iterable[event_pb2.EventResult]) -> None:
        """Compares an answer with the dict, and brings the dict up to date."""
        for event, result in zip(events, results, strict=True):
            key, verdict = event.event_id, (result.status, result.reason)
            if event.user_id in self._forgotten:
                assert verdict == (REJECTED, FORGOTTEN)
            elif (before := self._acknowledged.get(key)) is not None:
                assert verdict == ((DUPLICATE, 0) if event == before else (REJECTED, CONFLICT))
            elif (before := self._unknown.pop(key, None)) is None:
                assert verdict == (STORED, 0)
                self._acknowledged[key] = event
            elif event == before:
                assert verdict in ((STORED, 0), (DUPLICATE, 0))
                self._acknowledged[key] = event
            else:
                assert verdict in ((STORED, 0), (REJECTED, CONFLICT))
                self._acknowledged[key] = event if result.status == STORED else before

    def _drawn(self, data: st.DataObject) -> list[int]:
        places: list[int] = data.draw(
            st.lists(
                st.integers(0, len(self._sent) - 1),
                min_size=1,
                max_size=6,
                unique_by=lambda place: self._sent[place].event_id,
            )
        )
        return places

    def _mourn(self, person: str) -> None:
        self._forgotten.add(person)
        self._acknowledged = self._of_the_living(self._acknowledged)
        self._unknown = self._of_the_living(self._unknown)

    def _of_the_living(self, events: dict[str, event_pb2.Event]) -> dict[str, event_pb2.Event]:
        return {key: event for key, event in events.items() if event.user_id not in self._forgotten}

    def _told(self, person: str, events: dict[str, event_pb2.Event]) -> Counter[str]:
        return Counter(told(event) for event in events.values() if event.user_id == person)

    def _restart(self) -> None:
        self._cut_connections()
        dead, self._service = self._service, Service(self._settings, self._url)
        dead.dispose()

    def _cut_connections(self) -> None:
        self._sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )

    @contextmanager
    def _writers_held_up(self) -> Iterator[Callable[[], Any]]:
        def waits() -> bool:
            row = self._sql.execute(
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted "
                "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            ).fetchone()
            return row is not None and row[0] > 0

        self._sql.execute("SELECT pg_advisory_lock(%s)", (WRITERS_LOCK,))
        try:
            yield lambda: eventually(waits)
        finally:
            self._sql.execute("SELECT pg_advisory_unlock(%s)", (WRITERS_LOCK,))

    def _tables(self) -> list[str]:
        rows = self._sql.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'feedback'::regnamespace AND relkind IN ('r', 'p') "
            "AND NOT relispartition AND relname NOT LIKE 'alembic%' ORDER BY relname"
        ).fetchall()
        return [name for (name,) in rows]

    def _tombstones(self, command: str, stdin: str = "") -> str:
        """Runs a command of the program, as deploy/backup/tombstones.sh does."""
        with redirect_stdout(io.StringIO()) as stdout, mock.patch("sys.stdin", io.StringIO(stdin)):
            move_tombstones(self._settings, command)
        return stdout.getvalue()


@contextmanager
def _answers_of_commits_lost() -> Iterator[Callable[[], Any]]:
    """Every transaction commits, and the service never hears of it."""
    insert = LogWriter._insert

    def cut(self: LogWriter, *arguments: Any) -> Any:
        insert(self, *arguments)
        raise psycopg.OperationalError("gone")

    with mock.patch.object(LogWriter, "_insert", cut):
        yield lambda: None


@contextmanager
def _nothing() -> Iterator[Callable[[], Any]]:
    yield lambda: None


@pytest.fixture
def new_machine(
    postgres_server: str, migrated_template: str, keys_dir: Path, tmp_path: Path
) -> Callable[[], LogAgainstDict]:
    """Returns a function that makes a machine over a database of its own."""

    @contextmanager
    def new_database() -> Iterator[str]:
        name = f"test_{uuid.uuid4().hex}"
        with psycopg.connect(postgres_server, autocommit=True) as connection:
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(
                    *map(sql.Identifier, (name, migrated_template))
                )
            )
            try:
                yield psycopg.conninfo.make_conninfo(postgres_server, dbname=name)
            finally:
                connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))

    return lambda: LogAgainstDict(new_database, keys_dir, tmp_path)


def test_the_log_does_what_a_dict_would(new_machine: Callable[[], LogAgainstDict]) -> None:
    run_state_machine_as_test(
        new_machine,  # type: ignore[arg-type]  # A factory will do.
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            # A shorter history of the same failure takes minutes to find.
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_shortest_history_of_everything(new_machine: Callable[[], LogAgainstDict]) -> None:
    """Few random histories may leave a rule out; this one has them all."""
    machine = new_machine()
    steps: list[Callable[[], None]] = [
        lambda: machine.open_the_shop(("review", "item_view", "purchase", "review", "review")),
        lambda: machine.record([new_event("ada", "review", has_uuid=False)]),
        lambda: machine.record_in_two_calls_at_once([new_event("bob", "purchase", has_uuid=True)]),
        machine.crash,
        *(
            partial(machine.crash_under_way, [new_event("bob", "review", has_uuid=True)], moment)
            for moment in MOMENTS
        ),
        machine.dump,
        lambda: machine.record([new_event("ada", "item_view", has_uuid=True)]),
        lambda: machine.forget_and_crash_half_way("cem", True),
        lambda: machine.restore("ada", 2),
        lambda: machine.send_again(range(machine.sent_count)),
        lambda: machine.record([new_event(person, "review", has_uuid=True) for person in PEOPLE]),
    ]
    try:
        for step in steps:
            step()
            machine.the_log_is_the_dict()
            machine.nobody_forgotten_keeps_a_key()
    finally:
        machine.teardown()
