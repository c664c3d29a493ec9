"""What PostgreSQL can do to the log, with a real one: nothing acknowledged is lost, deadlines are kept, and when it
is well again the log is, without a restart of the service.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import psutil
import psycopg
import pytest
from psycopg import sql
from shopkeeper.feedback.v1 import consent_pb2, event_pb2, feedback_service_pb2, feedback_service_pb2_grpc

from services.feedback.storage.partitions import WRITERS_LOCK
from shared import embedded_postgres, grpc_status
from shared.database import ensure_database, migrate
from tests.feedback.conftest import REJECTED, eventually, item_view, uuid7
from tests.feedback.disks import postmaster, tmpfs
from tests.feedback.history import History, anomalies
from tests.feedback.nursery import Nursery, alive

DEADLINE_SECONDS = 1.5
# What a caller may meet; each comes with a remedy. Anything else is a mistake of the service's.
PASSING = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}


class Log:
    """A PostgreSQL of its own, and a service as a process of its own."""

    def __init__(self, home: Path, nursery: Nursery, keys: Path, service_home: Path) -> None:
        self.home = home
        self.url = embedded_postgres.start(home)
        ensure_database(self.url)
        migrate(self.url, "feedback")
        port = nursery.start(self.url, keys, service_home)
        self.pid = nursery.pid
        self._channel = grpc.insecure_channel(
            f"127.0.0.1:{port}",
            options=[("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)],
        )
        self.stub = feedback_service_pb2_grpc.FeedbackServiceStub(self._channel)
        self.history = History()
        self.codes: Counter[str] = Counter()
        self._stopped = threading.Event()
        self._shoppers = [threading.Thread(target=self._shop, args=(number,)) for number in range(3)]
        for shopper in self._shoppers:
            shopper.start()
        self.goes_on()

    def _shop(self, number: int) -> None:
        while not self._stopped.is_set():
            ids = [uuid7() for _ in range(5)]
            batch = [item_view(event_id=one, item_id=one, user_id=f"user {number}") for one in ids]
            self.history.invoke(ids)
            # The same events until somebody says what became of them; at the end, that nobody knows is said.
            while not self._stopped.is_set():
                try:
                    request = feedback_service_pb2.RecordEventsRequest(events=batch)
                    self.stub.RecordEvents(request, timeout=DEADLINE_SECONDS)
                except grpc.RpcError as failure:
                    self.codes[failure.code().name] += 1
                    self.history.info(ids)
                    self._stopped.wait(0.05)
                else:
                    self.history.ok(ids)
                    break

    def goes_on(self, events: int = 60) -> None:
        """Waits until so many more events are acknowledged."""
        enough = len(self.history.acknowledged) + events
        eventually(lambda: len(self.history.acknowledged) >= enough, 60)

    def fails(self, calls: int = 5, still: Callable[[], object] = bool) -> None:
        """Waits until so many more calls have failed, and keeps up what makes them fail."""
        enough = self.codes.total() + calls

        def failed() -> bool:
            still()
            return self.codes.total() >= enough

        eventually(failed, 60)

    def consent_code(self, timeout: float = DEADLINE_SECONDS) -> str:
        """Returns the code of setting a consent, which goes through another pool of connections."""
        request = feedback_service_pb2.SetConsentRequest(
            user_id="ada", consent=consent_pb2.Consent(marketing=True)
        )
        try:
            self.stub.SetConsent(request, timeout=timeout)
        except grpc.RpcError as failure:
            return failure.code().name
        return "OK"

    def administer(self, *statements: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            for statement in statements:
                connection.execute(sql.SQL(statement))  # type: ignore[arg-type]

    def stop_shoppers(self) -> None:
        self._stopped.set()
        for shopper in self._shoppers:
            shopper.join(30)
            assert not shopper.is_alive()

    def close(self) -> None:
        self._stopped.set()
        self._channel.close()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture
def log(
    nursery: Nursery, postgres_homes: Callable[[], Path], keys_dir: Path, tmp_path: Path
) -> Iterator[Log]:
    log = Log(postgres_homes(), nursery, keys_dir, tmp_path)
    yield log
    log.close()
    nursery.kill()


def survived(log: Log) -> None:
    """The end of every fault: the log goes on, by the same process, and has lost and doubled nothing."""
    log.goes_on()
    assert eventually(lambda: log.consent_code(10) == "OK", 30)
    assert alive(log.pid)
    log.stop_shoppers()
    with psycopg.connect(log.url) as connection:
        stored = [item for (item,) in connection.execute("SELECT item_id FROM feedback.events").fetchall()]
    assert anomalies(log.history, stored) == {}
    assert set(log.codes) <= PASSING


@contextmanager
def stopped(log: Log) -> Iterator[None]:
    """Stops PostgreSQL where it stands: it takes connections and bytes, and answers nothing."""
    main = postmaster(log.home)
    processes = [main, *main.children()]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


def test_restarted(log: Log) -> None:
    for how in (signal.SIGQUIT, signal.SIGINT):
        main = postmaster(log.home)
        main.send_signal(how)
        main.wait(30)
        log.fails()
        assert log.consent_code() == "UNAVAILABLE"
        embedded_postgres.stop(log.home)
        assert embedded_postgres.start(log.home) == log.url
        log.goes_on()
    survived(log)


def test_stopped(log: Log) -> None:
    with stopped(log):
        log.fails()
        # More than the service has threads, each with a deadline.
        consents = [
            log.stub.SetConsent.future(
                feedback_service_pb2.SetConsentRequest(
                    user_id=f"user {number}", consent=consent_pb2.Consent(marketing=True)
                ),
                timeout=DEADLINE_SECONDS,
            )
            for number in range(80)
        ]
        codes = {call.exception().code().name for call in consents}
        assert codes <= PASSING
        # What needs no database is answered: no thread is held beyond the deadline of its call.
        assert eventually(lambda: judged_alone(log))
    survived(log)


def judged_alone(log: Log) -> bool:
    event = event_pb2.Event(event_id="x", user_id="ada")
    try:
        answer = log.stub.RecordEvents(feedback_service_pb2.RecordEventsRequest(events=[event]), timeout=1)
    except grpc.RpcError:
        return False
    return [result.status for result in answer.results] == [REJECTED]


def test_slow(log: Log) -> None:
    # Slower than the deadlines: some are told that nobody knows, while their rows are on their way.
    log.administer(
        "CREATE FUNCTION feedback.dawdle() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN PERFORM pg_sleep(2); RETURN NULL; END'",
        "CREATE TRIGGER slow BEFORE INSERT ON feedback.events EXECUTE FUNCTION feedback.dawdle()",
    )
    log.fails(8)
    assert log.codes["DEADLINE_EXCEEDED"]
    log.administer("DROP TRIGGER slow ON feedback.events")
    survived(log)


def test_read_only(log: Log) -> None:
    log.administer("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
    log.fails()
    assert log.consent_code() == "UNAVAILABLE"
    log.administer(
        "SET default_transaction_read_only = off",
        "ALTER SYSTEM RESET default_transaction_read_only",
        "SELECT pg_reload_conf()",
    )
    survived(log)


def test_out_of_connections(log: Log) -> None:
    hogs: list[psycopg.Connection[Any]] = []
    admin = psycopg.connect(log.url, autocommit=True)
    cut = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE application_name LIKE 'shopkeeper%' AND pid <> pg_backend_pid()"
    )

    def full() -> bool:
        admin.execute(cut)
        while True:
            try:
                hogs.append(psycopg.connect(log.url, connect_timeout=5))
            except psycopg.OperationalError:
                break
        row = admin.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'shopkeeper%'"
        ).fetchone()
        return row == (0,)

    try:
        eventually(full, 60)
        # A connection that was being closed frees its place late, and the service is quick to take it.
        log.fails(still=full)
        assert log.consent_code(8) == "UNAVAILABLE"
    finally:
        for hog in [*hogs, admin]:
            hog.close()
    survived(log)


def test_deadlocked(log: Log) -> None:
    event_id = uuid7()
    with psycopg.connect(log.url) as other:
        # It is the service's transaction that finds the circle, and is its victim.
        other.execute("SET deadlock_timeout = '60s'")
        other.execute(
            "INSERT INTO feedback.events (event_key, payload_digest, occurred_at, kind, device, channel, consent, "
            "user_key) VALUES (%s, 0, now(), 3, 0, 0, 0, '')",
            (event_id,),
        )
        request = feedback_service_pb2.RecordEventsRequest(
            events=[item_view(event_id=event_id, item_id=event_id)]
        )
        log.history.invoke([event_id])
        call = log.stub.RecordEvents.future(request, timeout=30)
        waits = "SELECT 1 FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted"
        with psycopg.connect(log.url, autocommit=True) as watch:
            eventually(lambda: watch.execute(waits).fetchone())
        # The service holds this lock, shared, while it waits for the row.
        other.execute("SELECT pg_advisory_xact_lock(%s)", (WRITERS_LOCK,))
        failure = call.exception()
        assert failure.code() is grpc.StatusCode.UNAVAILABLE
        assert grpc_status.from_rpc_error(failure).metadata["cause"] == "DeadlockDetected"
        log.history.info([event_id])
        other.rollback()
    log.stub.RecordEvents(request, timeout=20)
    log.history.ok([event_id])
    survived(log)


def test_a_full_disk(nursery: Nursery, keys_dir: Path, tmp_path: Path) -> None:
    with tmpfs(300) as home:
        log = Log(home, nursery, keys_dir, tmp_path)
        ballast, main = home / "ballast", postmaster(home)
        try:
            fill(ballast)
            # The newest segment of the write-ahead log has room left; the next one has not.
            with suppress(psycopg.Error):
                log.administer("SELECT pg_switch_wal()")
            log.fails(8)
            # What needs no disk is answered.
            assert eventually(lambda: judged_alone(log))
        finally:
            ballast.unlink()
        try:
            # A write-ahead log that cannot grow makes PostgreSQL crash and recover by itself, where there is room again by
            # the end of its recovery. Where there is not, it has ended for good, and its operator starts it again.
            # Nobody restarts the service.
            if eventually(lambda: postgres_answers(log) or (has_ended(main) and "ended"), 60) == "ended":
                embedded_postgres.stop(home)
                assert embedded_postgres.start(home) == log.url
            survived(log)
        finally:
            log.close()
            nursery.kill()
            embedded_postgres.stop(home)


def has_ended(process: psutil.Process) -> bool:
    """Returns whether a process has ended, whether or not its parent has asked after it."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def fill(ballast: Path) -> None:
    """Writes until nothing more fits."""
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


def postgres_answers(log: Log) -> bool:
    try:
        psycopg.connect(log.url, connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True
