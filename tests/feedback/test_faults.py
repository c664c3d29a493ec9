"""Killed servers, lost connections, random input: nothing acknowledged is lost, nothing is stored twice."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql
from shopkeeper.feedback.v1 import (
    consent_pb2,
    event_kind_pb2,
    event_pb2,
    experiment_pb2,
    feedback_service_pb2,
    feedback_service_pb2_grpc,
    import_pb2,
)

from tests.feedback.conftest import DUPLICATE, STORED, Shop, eventually, item_view

REPOSITORY = Path(__file__).resolve().parents[2]


class Server:
    """The service as a process of its own."""

    def __init__(self, url: str, keys: Path, home: Path, port: int = 0) -> None:
        self.log = home / "server.log"
        self.port = port
        environment = {
            **os.environ,
            "DATABASE_URL": url,
            "SHOPKEEPER_HOME": str(home),
            "SHOPKEEPER_KEYS": str(keys),
            "SHOPKEEPER_LISTEN": f"127.0.0.1:{port}",
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.feedback"], cwd=REPOSITORY, env=environment, stderr=log
            )
        try:
            self.port = int(eventually(self._ready, 60)[1])
        except BaseException:
            self.kill()
            raise

    def _ready(self) -> re.Match[str] | None:
        log = self.log.read_text()
        assert self.process.poll() is None, log
        return re.search(r"feedback ready on 127\.0\.0\.1:(\d+)", log)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


def call(port: int, batch: list[event_pb2.Event]) -> list[int]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = feedback_service_pb2_grpc.FeedbackServiceStub(channel)
        answer = stub.RecordEvents(feedback_service_pb2.RecordEventsRequest(events=batch), timeout=20)
        return [result.status for result in answer.results]


@pytest.mark.slow
def test_an_acknowledged_event_survives_a_killed_server(
    database_url: str, keys_dir: Path, tmp_path: Path
) -> None:
    acknowledged: set[str] = set()
    invoked: dict[str, event_pb2.Event] = {}
    lock = threading.Lock()

    def shopper(port: int) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = feedback_service_pb2_grpc.FeedbackServiceStub(channel)
            sent: dict[int, list[str]] = {}

            def batches() -> Iterator[feedback_service_pb2.StreamEventsRequest]:
                number = 0
                while True:
                    number += 1
                    batch = [item_view(user_id=f"user {number % 7}") for _ in range(20)]
                    with lock:
                        invoked.update({one.event_id: one for one in batch})
                    sent[number] = [one.event_id for one in batch]
                    yield feedback_service_pb2.StreamEventsRequest(batch_number=number, events=batch)

            try:
                for answer in stub.StreamEvents(batches(), timeout=60):
                    assert {result.status for result in answer.results} == {STORED}
                    with lock:
                        acknowledged.update(sent[answer.batch_number])
            except grpc.RpcError:
                pass

    for round_number in range(3):
        home = tmp_path / str(round_number)
        home.mkdir()
        server = Server(database_url, keys_dir, home)
        shoppers = [threading.Thread(target=shopper, args=(server.port,)) for _ in range(3)]
        goal = len(acknowledged) + 500
        for thread in shoppers:
            thread.start()
        try:
            eventually(lambda goal=goal: len(acknowledged) >= goal, 60)  # type: ignore[misc]
        finally:
            server.kill()
        for thread in shoppers:
            thread.join(30)

    with psycopg.connect(database_url) as connection:
        stored = [
            str(key) for (key,) in connection.execute("SELECT event_key FROM feedback.events").fetchall()
        ]
    assert acknowledged <= set(stored) <= set(invoked)
    assert len(stored) == len(set(stored))

    # A client that was never answered sends again, and every event is there once.
    home = tmp_path / "last"
    home.mkdir()
    server = Server(database_url, keys_dir, home)
    try:
        events = list(invoked.values())
        for start in range(0, len(events), 1000):
            batch = events[start : start + 1000]
            for one, status in zip(batch, call(server.port, batch), strict=True):
                assert status == (DUPLICATE if one.event_id in set(stored) else STORED)
    finally:
        server.process.terminate()
        assert server.process.wait(30) == 0
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM feedback.events").fetchone() == (len(invoked),)


def test_a_missing_key_is_one_line_and_exit_code_two(database_url: str, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "DATABASE_URL": database_url,
        "SHOPKEEPER_HOME": str(tmp_path),
        "SHOPKEEPER_LISTEN": "127.0.0.1:0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "services.feedback"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "KEY_MISSING" in done.stderr
    assert "Traceback" not in done.stderr


def disconnect(url: str, *, allow: bool) -> None:
    """Cuts every connection of the service, and lets new ones in or not, as a restart would."""
    name = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
    with psycopg.connect(
        psycopg.conninfo.make_conninfo(url, dbname="postgres"), autocommit=True
    ) as connection:
        connection.execute(
            sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}").format(
                sql.Identifier(str(name)), sql.SQL("true" if allow else "false")
            )
        )
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,)
        )


def statuses_unless_unavailable(shop: Shop, batch: list[event_pb2.Event]) -> list[int]:
    """Returns the verdicts, or nothing where the service asks for a retry; any other failure is raised."""
    try:
        return shop.statuses(*batch)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return []


def test_the_service_outlives_its_database(shop: Shop) -> None:
    assert shop.statuses(item_view()) == [STORED]
    disconnect(shop.url, allow=False)
    waiting = item_view()
    # The channel retries UNAVAILABLE a few times by itself, and then says so.
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as failure:
            shop.record(waiting)
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    disconnect(shop.url, allow=True)

    assert eventually(lambda: statuses_unless_unavailable(shop, [waiting])) == [STORED]
    assert shop.count() == 2


def test_connections_cut_again_and_again_lose_and_double_nothing(shop: Shop) -> None:
    stopped = threading.Event()
    acknowledged: list[str] = []

    def shopper() -> None:
        while not stopped.is_set():
            batch = [item_view() for _ in range(5)]
            while not stopped.is_set():
                if statuses := statuses_unless_unavailable(shop, batch):
                    assert set(statuses) <= {STORED, DUPLICATE}
                    acknowledged.extend(one.event_id for one in batch)
                    break

    threads = [threading.Thread(target=shopper) for _ in range(3)]
    for thread in threads:
        thread.start()
    for goal in (50, 100, 150, 200):
        eventually(lambda goal=goal: len(acknowledged) >= goal, 60)  # type: ignore[misc]
        disconnect(shop.url, allow=True)
    stopped.set()
    for thread in threads:
        thread.join(30)
    stored = [str(key) for (key,) in shop.sql("SELECT event_key FROM feedback.events")]
    assert set(acknowledged) <= set(stored)
    assert len(stored) == len(set(stored))


# Random, legal input

TRAPS = [
    "",
    "a",
    "\x00",
    "é",
    "e\u0301",
    "\ud7ff",
    "\U0010ffff",
    "x" * 300,
    "x" * 30_000,
    '{"\\}',
    "\r\n",
    "EUR",
    "'; --",
]


def fill(message: Message, rng: random.Random, depth: int = 0) -> Message:
    """Sets random fields of a message to random legal values, edge cases more often than not."""
    chosen = {one.name: rng.choice(one.fields).name for one in message.DESCRIPTOR.oneofs}
    for field in message.DESCRIPTOR.fields:
        # The members of a oneof would overwrite each other, and the last would always win.
        one = field.containing_oneof
        if one is not None and len(one.fields) > 1:
            if chosen[one.name] != field.name:
                continue
        elif rng.random() < 0.15:
            continue
        count = rng.choice((0, 1, 2, 5)) if field.is_repeated else 1
        for _ in range(count):
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                if depth < 4:
                    target = (
                        getattr(message, field.name).add()
                        if field.is_repeated
                        else getattr(message, field.name)
                    )
                    target.SetInParent()
                    fill(target, rng, depth + 1)
                continue
            value = scalar(field, rng)
            if field.is_repeated:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)
    return message


ORDINARY = {"currency_code": "EUR", "stars": 4.0, "csat": 4, "nps": 9, "price_micros": 5_000_000}


def scalar(field: FieldDescriptor, rng: random.Random) -> object:
    # Mostly ordinary: an event of edge cases alone is refused at the first of them.
    if rng.random() < 0.8:
        if field.name in ORDINARY:
            return ORDINARY[field.name]
        if field.type == FieldDescriptor.TYPE_STRING:
            return rng.choice(("lamp", "Ünïcode", '{"\\}', "'; --", "e\u0301"))
        if field.type not in (FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_BOOL):
            return rng.choice((0, 1, 2))
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice(TRAPS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return rng.choice((b"", b"\x00", b"\xff" * 16, b"x" * 5_000))
    if field.type == FieldDescriptor.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return rng.choice((0.0, -0.0, 1.0, 3.4e38, -1.0, 1e-45, float("inf"), float("-inf"), float("nan")))
    if field.type == FieldDescriptor.TYPE_ENUM:
        return rng.choice((0, 1, 2, 17, 99, -1, 2**31 - 1))
    bits = 31 if field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_SINT32) else 63
    return rng.choice((0, 1, -1, 1_700_000_000, 2**bits - 1, -(2**bits)))


WRONG_CODES = (
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.DEADLINE_EXCEEDED,
)


def outcome(shop: Shop, method: str, requests: list[Any], descriptor: Any) -> tuple[grpc.StatusCode, str]:
    """Calls a method to its end and returns its code."""
    call = getattr(shop.stub, method)
    try:
        if descriptor.client_streaming:
            list(call(iter(requests), timeout=20))
        elif method == "WatchMetrics":
            stream = call(requests[0], timeout=20)
            next(iter(stream))
            stream.cancel()
        elif descriptor.server_streaming:
            list(call(requests[0], timeout=20))
        else:
            call(requests[0], timeout=20)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


METHODS = feedback_service_pb2.DESCRIPTOR.services_by_name["FeedbackService"].methods_by_name
# Of each method.
RANDOM_REQUESTS = int(os.environ.get("SHOPKEEPER_RANDOM_REQUESTS", "12"))


@pytest.fixture
def real_names(shop: Shop) -> dict[str, list[str]]:
    """Names of things that are there, by the field that names them: what is not there is soon answered."""
    shop.imports.mkdir()
    (shop.imports / "views.csv").write_text("who,what,when\nada,lamp,2024-03-01T00:00:00Z\n")
    shop.record(item_view(), item_view(user_id="bob"))
    source = import_pb2.ImportSource(path="views.csv", mapping=MAPPING)
    begun = [
        shop.stub.ImportEvents(feedback_service_pb2.ImportEventsRequest(source=source)) for _ in range(2)
    ]
    experiment = experiment_pb2.Experiment(
        experiment_id="lamp", placement="home",
        variants=[experiment_pb2.Variant(variant_id=one, weight=1, serving_config=one) for one in ("a", "b")],
    )  # fmt: skip
    shop.stub.CreateExperiment(feedback_service_pb2.CreateExperimentRequest(experiment=experiment))
    rotation = shop.stub.RotateUserKeys(feedback_service_pb2.RotateUserKeysRequest())
    receipt = shop.stub.ForgetUser(feedback_service_pb2.ForgetUserRequest(user_id="bob"))
    # Nobody would wait for the end of one that nobody runs.
    shop.stub.CancelImport(feedback_service_pb2.CancelImportRequest(import_id=begun[0].import_id))
    pages = shop.stub.ListImports(feedback_service_pb2.ListImportsRequest(page_size=1))
    return {
        "import_id": [begun[0].import_id],
        "experiment_id": ["lamp"],
        "key_rotation_id": [rotation.key_rotation_id],
        "receipt_id": [receipt.receipt_id],
        "page_token": [pages.next_page_token],
        "path": ["views.csv"],
        "user_id": ["ada", "bob"],
        "placement": ["home"],
    }


MAPPING = import_pb2.ColumnMapping(
    user_id_column="who", occurred_at_column="when", item_id_column="what",
    default_kind=event_kind_pb2.EVENT_KIND_ITEM_VIEW,
)  # fmt: skip
THEN, NOW = Timestamp(seconds=1_600_000_000), Timestamp(seconds=1_700_000_000)
# What answers without a reproach; methods that are not here need no more than a name.
ORDINARY_REQUESTS: dict[str, Message] = {
    "CreateExperiment": feedback_service_pb2.CreateExperimentRequest(
        experiment=experiment_pb2.Experiment(
            experiment_id="new", placement="cart",
            variants=[experiment_pb2.Variant(variant_id=one, weight=1, serving_config=one) for one in ("a", "b")],
        )
    ),
    "EstimatePolicyValue": feedback_service_pb2.EstimatePolicyValueRequest(
        placement="home", start_time=THEN, uniform=feedback_service_pb2.UniformPolicy()
    ),
    "GetMetrics": feedback_service_pb2.GetMetricsRequest(start_time=THEN, end_time=NOW),
    "ImportEvents": feedback_service_pb2.ImportEventsRequest(
        source=import_pb2.ImportSource(path="views.csv", mapping=MAPPING)
    ),
    "PurgeEvents": feedback_service_pb2.PurgeEventsRequest(start_time=THEN, end_time=NOW),
    "RecordEvents": feedback_service_pb2.RecordEventsRequest(events=[item_view()]),
    "SetConsent": feedback_service_pb2.SetConsentRequest(
        user_id="ada", consent=consent_pb2.Consent(training=True)
    ),
    "StreamEvents": feedback_service_pb2.StreamEventsRequest(events=[item_view()]),
}  # fmt: skip


def name_real_things(message: Message, names: dict[str, list[str]], rng: random.Random) -> None:
    for field, value in list(message.ListFields()):
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for one in value if field.is_repeated else [value]:
                name_real_things(one, names, rng)
    for field in message.DESCRIPTOR.fields:
        # A listing may go on after a page, and mostly begins.
        likely = 0.2 if field.name == "page_token" else 0.7
        if field.name in names and not field.is_repeated and rng.random() < likely:
            setattr(message, field.name, rng.choice(names[field.name]))


def mutate(message: Message, strange: Message, rng: random.Random) -> None:
    """Takes none, one or two fields, at any depth, from a strange message of the same type."""
    for field in rng.sample(
        list(message.DESCRIPTOR.fields), min(rng.choice((0, 1, 1, 2)), len(message.DESCRIPTOR.fields))
    ):
        single = field.type == FieldDescriptor.TYPE_MESSAGE and not field.is_repeated
        if single and message.HasField(field.name) and rng.random() < 0.7:
            mutate(getattr(message, field.name), getattr(strange, field.name), rng)
            continue
        message.ClearField(field.name)
        part = type(strange)()
        part.CopyFrom(strange)
        for other in part.DESCRIPTOR.fields:
            if other.name != field.name:
                part.ClearField(other.name)
        message.MergeFrom(part)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_random_legal_messages_never_end_in_unknown_or_internal(
    shop: Shop, real_names: dict[str, list[str]], method: str
) -> None:
    descriptor = METHODS[method]
    request_type = getattr(feedback_service_pb2, descriptor.input_type.name)
    codes = Counter[str]()
    for seed in range(RANDOM_REQUESTS):
        rng = random.Random(f"{method} {seed}")
        requests = [fill(request_type(), rng) for _ in range(2)]
        for request in requests:
            if seed % 3:
                ordinary = request_type()
                ordinary.CopyFrom(ORDINARY_REQUESTS.get(method, ordinary))
                mutate(ordinary, request, rng)
                request.CopyFrom(ordinary)
            name_real_things(request, real_names, rng)
        code, details = outcome(shop, method, requests, descriptor)
        codes[code.name] += 1
        assert code not in WRONG_CODES, (method, seed, details)
    # Guards the generator: were all refused at the door, this would show nothing.
    assert codes.keys() & {"OK", "FAILED_PRECONDITION"}, codes


def random_events(seed: int) -> list[event_pb2.Event]:
    rng = random.Random(seed)
    events = [fill(event_pb2.Event(), rng) for _ in range(5)]
    for one in events:
        # Mostly whole, or nothing beyond the identity would ever be looked at.
        if rng.random() < 0.9:
            one.user_id = f"user {seed % 5}"
            one.event_id = item_view().event_id
            one.ClearField("occurred_at")
    return events


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_random_events_each_get_a_verdict(shop: Shop, seed: int) -> None:
    results = shop.record(*random_events(seed)).results
    assert len(results) == 5
    assert all(result.status in (1, 2, 3, 4) for result in results)
    assert all(result.reason and result.message for result in results if result.status == 4)


def test_random_events_of_every_kind_are_stored(shop: Shop) -> None:
    # Guards the generator: were all of its events refused, the tests above would show nothing.
    for seed in range(300):
        shop.record(*random_events(seed))
    kinds = {kind for (kind,) in shop.sql("SELECT DISTINCT kind FROM feedback.events")}
    assert kinds == set(range(1, 18))
    exported = shop.stub.ExportUser(feedback_service_pb2.ExportUserRequest(user_id="user 1"), timeout=20)
    assert sum(len(part.json_lines) for part in exported) > 20
    shop.stub.GetMetrics(feedback_service_pb2.GetMetricsRequest(), timeout=20)
