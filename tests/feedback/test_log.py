"""The log as its readers see it: views, tailing, partitions, group commit."""

from __future__ import annotations

import threading
from concurrent.futures import wait

import psycopg
import pytest
from shopkeeper.feedback.v1 import event_pb2

from services.feedback.domain.event_key import (
    event_key_of_digest,
    event_key_of_uuid,
    first_event_key,
    milliseconds_of,
)
from services.feedback.domain.events import Appended, AppendVerdict, EventColumns, key_column
from services.feedback.storage.group_commit import GroupCommitLog
from services.feedback.storage.log_writer import verify_durability
from services.feedback.storage.partitions import ensure_month, existing_months, month_of, months_of
from shared.errors import FailedPrecondition, ResourceExhausted, Unavailable
from tests.feedback.conftest import STORED, Shop, event, eventually, item_view, uuid7

# Keys


def test_a_uuid7_is_its_own_key_and_any_other_id_gets_one() -> None:
    assert event_key_of_uuid("018bcfe5-687b-7fff-bfff-ffffffffffff") == bytes.fromhex(
        "018bcfe5687b7fffbfffffffffffffff"
    )
    assert event_key_of_uuid("018bcfe5-687b-4fff-bfff-ffffffffffff") is None
    assert event_key_of_uuid("018bcfe5-687b-7fff-0fff-ffffffffffff") is None
    key = event_key_of_digest("order-17", 1_700_000_000_123)
    assert milliseconds_of(key) == 1_700_000_000_123
    assert key[6] >> 4 == 7
    assert key[8] >> 6 == 0b10
    assert event_key_of_digest("order-18", 1_700_000_000_123) != key
    assert event_key_of_digest("order-17", -5)[:6] == bytes(6)


# Views


def test_readers_find_new_rows_by_index(shop: Shop) -> None:
    for month in range(3):
        start = 1_700_000_000_000 + month * 31 * 86_400_000
        shop.record(*[item_view(event_id=uuid7(start + number)) for number in range(1000)])
    shop.sql("ANALYZE feedback.events")
    shop.record(item_view(event_id=uuid7(1_700_000_500_000)))
    xid = shop.sql("SELECT max(xid::text::bigint) FROM feedback.events")[0][0]
    with psycopg.connect(shop.url) as connection:
        connection.execute("SET ROLE shopkeeper_profile")
        for view in ("feedback.events_v1", "feedback.training_events_v1"):
            plan = "\n".join(
                row[0]
                for row in connection.execute(
                    f"EXPLAIN SELECT * FROM {view} WHERE xid >= '{xid}'::xid8"
                ).fetchall()
            )
            assert "Index Cond: (xid >=" in plan
            assert "Seq Scan on events_y" not in plan


def test_a_service_reads_the_published_views_and_nothing_else(shop: Shop) -> None:
    for role in ("shopkeeper_profile", "shopkeeper_trainer"):
        views = ["events_v1", "training_events_v1", "tombstones_v1", "consents_v1", "log_transactions_v1"]
        # What was shown to whom is for training alone.
        views += ["training_responses_v1"] if role == "shopkeeper_trainer" else []
        for view in views:
            assert shop.sql(f"SELECT * FROM feedback.{view}", role=role) == []
        for table in ("events", "consents", "data_keys", "tombstones"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                shop.sql(f"SELECT * FROM feedback.{table}", role=role)


def test_the_columns_of_the_views_are_the_published_ones(shop: Shop) -> None:
    def columns(view: str) -> list[str]:
        return [
            name
            for (name,) in shop.sql(
                "SELECT attname::text FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum",
                f"feedback.{view}",
            )
        ]

    core = [
        "event_key", "line", "xid", "user_key", "kind", "occurred_at", "item_id", "quantity", "price_micros",
        "currency_code", "value", "session_key",
    ]  # fmt: skip
    attribution = ["placement", "model_version", "serving_config", "variant"]
    assert columns("events_v1") == [*core, *attribution, "is_bot", "personalisation", "device", "channel"]
    assert columns("training_events_v1") == [*core, "is_bot", "personalisation"]
    assert columns("tombstones_v1") == ["user_key", "xid", "erased_at"]


def test_training_sees_only_rows_with_an_item(shop: Shop) -> None:
    shop.record(item_view(), event(search=event_pb2.Search(query="x")), event(page_view=event_pb2.PageView()))
    assert shop.sql("SELECT count(*) FROM feedback.training_events_v1") == [(1,)]


class Tailer:
    """Reads the log as profile does: in one transaction, by snapshots."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True)
        self._seen = "1:1:"

    def poll(self) -> list[str]:
        with self._connection.transaction():
            self._connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            row = self._connection.execute("SELECT pg_current_snapshot()::text").fetchone()
            assert row is not None
            rows = self._connection.execute(
                "SELECT item_id FROM feedback.events_v1 WHERE xid >= pg_snapshot_xmin(%s::pg_snapshot) "
                "AND NOT pg_visible_in_snapshot(xid, %s::pg_snapshot)",
                (self._seen, self._seen),
            ).fetchall()
            self._seen = row[0]
        return [item for (item,) in rows]

    def close(self) -> None:
        self._connection.close()


def test_a_late_commit_is_not_skipped_by_a_tailer(shop: Shop) -> None:
    shop.record(item_view(item_id="first"))
    tailer = Tailer(shop.url)
    assert tailer.poll() == ["first"]
    with psycopg.connect(shop.url) as late:
        # It has its transaction id, and so its place in any sequence, before the next event.
        late.execute(
            "INSERT INTO feedback.events (event_key, payload_digest, occurred_at, kind, device, channel, consent, "
            "user_key, item_id) VALUES (gen_random_uuid(), 0, now(), 3, 0, 0, 0, '\\x00', 'late')"
        )
        shop.record(item_view(item_id="second"))
        assert tailer.poll() == ["second"]
        late.commit()
    assert tailer.poll() == ["late"]
    assert tailer.poll() == []
    tailer.close()


# Partitions


def test_a_month_gets_its_partition_when_it_first_appears(shop: Shop) -> None:
    shop.record(item_view(event_id=uuid7(1_583_020_799_999)), item_view(event_id=uuid7(1_583_020_800_000)))
    assert shop.sql("SELECT count(*) FROM feedback.events_y2020m02") == [(1,)]
    assert shop.sql("SELECT count(*) FROM feedback.events_y2020m03") == [(1,)]
    assert shop.sql("SELECT count(*) FROM feedback.events_default") == [(0,)]


def test_rows_of_the_default_partition_move_when_their_month_is_made(shop: Shop) -> None:
    moment = 4_102_444_800_000  # 2100-01-01
    shop.record(item_view(event_id=uuid7(moment)), item_view(event_id=uuid7(moment + 40 * 86_400_000)))
    before = shop.sql("SELECT event_key, xid::text FROM feedback.events ORDER BY event_key")
    month = int(months_of(key_column([first_event_key(moment)]))[0])
    with psycopg.connect(shop.url, autocommit=True) as connection:
        connection.execute("SET ROLE shopkeeper_feedback")
        ensure_month(connection, month)
        ensure_month(connection, month)
        assert month in existing_months(connection)
    assert shop.sql("SELECT event_key, xid::text FROM feedback.events ORDER BY event_key") == before
    assert shop.sql("SELECT count(*) FROM feedback.events_y2100m01") == [(1,)]
    assert shop.sql("SELECT count(*) FROM feedback.events_default") == [(1,)]


def test_replicas_that_meet_a_new_month_at_once_agree(shop: Shop) -> None:
    failures: list[Exception] = []

    def create() -> None:
        try:
            with psycopg.connect(shop.url, autocommit=True) as connection:
                connection.execute("SET ROLE shopkeeper_feedback")
                ensure_month(connection, 500)
        except psycopg.errors.LockNotAvailable:
            pass  # Somebody else is at it; that is what the caller makes of it as well.
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert shop.sql("SELECT count(*) FROM feedback.events_y2011m09") == [(0,)]


def test_a_long_reader_does_not_hold_up_the_log(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.record(item_view())
    with psycopg.connect(shop.url) as trainer:
        trainer.execute("SELECT count(*) FROM feedback.events_v1")
        # The month cannot be made while it reads; the event is stored all the same.
        assert shop.statuses(item_view(event_id=uuid7(1_583_000_000_000))) == [STORED]
        assert shop.sql("SELECT count(*) FROM feedback.events_default") == [(1,)]
    monkeypatch.setattr("services.feedback.storage.log_writer.PARTITION_RETRY_SECONDS", 0.0)

    def moved() -> bool:
        shop.record(item_view(event_id=uuid7(1_583_000_000_000)))
        return shop.sql("SELECT count(*) FROM feedback.events_default") == [(0,)]

    eventually(moved)
    assert shop.sql("SELECT count(*) FROM feedback.events_y2020m02")[0][0] >= 2


def test_the_month_of_a_key_is_that_of_its_time() -> None:
    from datetime import UTC, datetime

    for text in ("2000-01-01T00:00:00", "2024-02-29T23:59:59.999", "1970-01-01T00:00:00"):
        moment = datetime.fromisoformat(text).replace(tzinfo=UTC)
        key = first_event_key(round(moment.timestamp() * 1000))
        assert months_of(key_column([key])).tolist() == [month_of(moment)]


# Group commit


class GatedWriter:
    """Commits when it is told to."""

    def __init__(self) -> None:
        self.commits: list[int] = []
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.verdicts: dict[int, AppendVerdict] = {}
        self.failure: Exception | None = None

    def append(self, columns: EventColumns) -> Appended:
        self.entered.set()
        assert self.gate.wait(10)
        self.commits.append(len(columns))
        if self.failure is not None:
            raise self.failure
        return Appended(len(self.commits), self.verdicts)

    def close(self) -> None:
        pass


def rows(count: int) -> EventColumns:
    return rows_of_kind(3, count)


def rows_of_kind(kind: int, count: int) -> EventColumns:
    row = (bytes(16), 0, bytes(16), bytes(16), kind, 0, None, "lamp", None, None, None, None, 0, 0, 0)
    return EventColumns.from_rows([row] * count, {})


def test_calls_that_wait_for_the_same_commit_share_it() -> None:
    writer = GatedWriter()
    log = GroupCommitLog(writer, max_rows=100, queue_rows=1_000)
    first = log.append(rows(1))
    assert writer.entered.wait(10)
    waiting = [log.append(rows(2)) for _ in range(10)]
    # Row 5 of the shared commit is row 1 of the third call.
    writer.verdicts = {5: AppendVerdict.DUPLICATE}
    writer.gate.set()
    wait([first, *waiting], 10)
    log.close()
    assert writer.commits == [1, 20]
    assert {future.result().xid for future in waiting} == {2}
    assert [future.result().exceptions for future in waiting] == [
        {1: AppendVerdict.DUPLICATE} if index == 2 else {} for index in range(10)
    ]


def test_a_commit_that_fails_is_acknowledged_to_nobody() -> None:
    writer = GatedWriter()
    writer.failure = Unavailable("LOG_UNAVAILABLE", "gone")
    writer.gate.set()
    log = GroupCommitLog(writer, max_rows=100, queue_rows=1_000)
    with pytest.raises(Unavailable):
        log.append(rows(1)).result(10)
    writer.failure = None
    assert log.append(rows(1)).result(10).xid == 2
    log.close()


def test_a_batch_that_cannot_be_stored_does_not_cost_others_theirs() -> None:
    class Choosy(GatedWriter):
        def append(self, columns: EventColumns) -> Appended:
            super().append(columns)
            if 13 in columns.column("kind"):
                raise psycopg.DataError("no such thing")
            return Appended(1, {})

    writer = Choosy()
    log = GroupCommitLog(writer, max_rows=100, queue_rows=1_000)
    first = log.append(rows(1))
    assert writer.entered.wait(10)
    good = log.append(rows(2))
    bad = log.append(rows_of_kind(13, 1))
    writer.gate.set()
    assert first.result(10).xid == good.result(10).xid == 1
    with pytest.raises(Unavailable):
        bad.result(10)
    log.close()


def test_a_second_commit_begins_beside_the_first_once_half_as_many_rows_wait() -> None:
    writers = GatedWriter(), GatedWriter()
    log = GroupCommitLog(*writers, max_rows=1_000, queue_rows=10_000)
    first = log.append(rows(400))
    assert eventually(lambda: any(writer.entered.is_set() for writer in writers))
    busy, idle = sorted(writers, key=lambda writer: not writer.entered.is_set())
    small = log.append(rows(199))
    assert not idle.entered.wait(0.2)
    enough = log.append(rows(1))
    idle.gate.set()
    wait([small, enough], 10)
    assert idle.commits == [200]
    assert not first.done()
    busy.gate.set()
    first.result(10)
    log.close()


@pytest.mark.parametrize("under_way", [1, 60])
def test_few_rows_wait_for_the_commit_under_way_rather_than_for_the_disk_once_more(under_way: int) -> None:
    writers = GatedWriter(), GatedWriter()
    log = GroupCommitLog(*writers, max_rows=1_000, queue_rows=10_000)
    first = log.append(rows(under_way))
    assert eventually(lambda: any(writer.entered.is_set() for writer in writers))
    busy, idle = sorted(writers, key=lambda writer: not writer.entered.is_set())
    few = log.append(rows(99))
    assert not idle.entered.wait(0.2)
    for writer in writers:
        writer.gate.set()
    wait([first, few], 10)
    log.close()
    assert busy.commits[0] == under_way
    assert sum(busy.commits) + sum(idle.commits) == under_way + 99


def test_a_queue_that_is_full_refuses_with_a_time_to_come_back() -> None:
    writer = GatedWriter()
    log = GroupCommitLog(writer, max_rows=10, queue_rows=20)
    log.append(rows(1))
    assert writer.entered.wait(10)
    log.append(rows(15))
    with pytest.raises(ResourceExhausted) as failure:
        log.append(rows(15))
    assert failure.value.retry_after_seconds > 0
    writer.gate.set()
    log.close()


def test_what_waits_is_committed_before_the_service_ends() -> None:
    writer = GatedWriter()
    log = GroupCommitLog(writer, max_rows=10, queue_rows=100)
    futures = [log.append(rows(4)) for _ in range(6)]
    writer.gate.set()
    log.close()
    assert all(future.done() for future in futures)
    with pytest.raises(Unavailable):
        log.append(rows(1))


def test_a_database_that_does_not_wait_for_the_disk_is_refused(shop: Shop) -> None:
    with psycopg.connect(shop.url, autocommit=True) as connection:
        verify_durability(connection)
        connection.execute("SET synchronous_commit = off")
        with pytest.raises(FailedPrecondition) as failure:
            verify_durability(connection)
    assert failure.value.metadata == {"setting": "synchronous_commit", "value": "off"}


def test_commits_are_shared_over_the_wire(shop: Shop) -> None:
    from concurrent.futures import ThreadPoolExecutor

    # One writer holds the log up; the calls that come meanwhile must not queue up for a commit each.
    with psycopg.connect(shop.url) as blocker:
        blocker.execute("LOCK TABLE feedback.events IN EXCLUSIVE MODE")
        with ThreadPoolExecutor(20) as pool:
            futures = [pool.submit(shop.statuses, item_view()) for _ in range(20)]
            wait(futures, 0.5)
            blocker.commit()
            assert [future.result() for future in futures] == [[STORED]] * 20
    assert shop.sql("SELECT count(DISTINCT xid::text) FROM feedback.events")[0][0] <= 10
