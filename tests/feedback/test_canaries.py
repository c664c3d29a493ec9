"""Ten thousand raw ids and texts go in through the door, and are found nowhere behind it.

Searched are every table, the statistics, the write-ahead log, and the logs of the service and of PostgreSQL; for
the canaries as they are, in hexadecimal, in base64, and as plain SHA-256, whole or cut to 8 bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psycopg
import pytest
from psycopg import sql
from shopkeeper.feedback.v1 import (
    consent_pb2,
    event_kind_pb2,
    event_pb2,
    feedback_service_pb2,
    feedback_service_pb2_grpc,
    import_pb2,
)

from tests.feedback.conftest import DUPLICATE, STORED, eventually, uuid7
from tests.feedback.nursery import Nursery

COUNT = 10_000
MARK = "Zq7wKanary4Xv9"


class Searcher:
    """Finds canaries in bytes. All begin with the mark; their digests have nothing in common."""

    def __init__(self, canaries: list[str]) -> None:
        self._plain = self._disguises(MARK.encode())
        digests = [hashlib.sha256(canary.encode()).digest() for canary in canaries]
        self._digests = np.unique(np.frombuffer(b"".join(digest[:8] for digest in digests), dtype="<u8"))

    @staticmethod
    def _disguises(mark: bytes) -> dict[str, bytes]:
        found = {"raw": mark, "hexadecimal": mark.hex().encode(), "HEXADECIMAL": mark.hex().upper().encode()}
        for shift in range(3):
            # Wherever in a text it stands, one of three alignments of base64 shows it, but for its ends.
            encoded = base64.b64encode(b"x" * shift + mark)
            found[f"base64, shifted by {shift}"] = encoded[(0, 2, 3)[shift] : -4]
        return found

    def found(self, haystack: bytes) -> set[str]:
        """Returns in what disguise there is a canary."""
        found = {name for name, needle in self._plain.items() if needle in haystack}
        if self._has_digest(haystack):
            found.add("SHA-256")
        runs = [run.decode() for run in re.findall(rb"[0-9a-fA-F]{16,}", haystack)]
        # A digest may begin at an even place of a run, or at an odd one.
        halves = (
            b"".join(bytes.fromhex(run[odd : len(run) - (len(run) - odd) % 2]) for run in runs)
            for odd in (0, 1)
        )
        if any(map(self._has_digest, halves)):
            found.add("SHA-256 in hexadecimal")
        encoded = set(re.findall(rb"[A-Za-z0-9+/_-]{43}=?", haystack))
        decoded = b"".join(
            base64.b64decode(run[:43] + b"=", altchars=b"-_" if b"-" in run or b"_" in run else None)
            for run in encoded
        )
        if self._has_digest(decoded):
            found.add("SHA-256 in base64")
        return found

    def _has_digest(self, haystack: bytes) -> bool:
        for offset in range(min(8, max(0, len(haystack) - 7))):
            windows = np.frombuffer(haystack, dtype="<u8", offset=offset, count=(len(haystack) - offset) // 8)
            places = np.minimum(np.searchsorted(self._digests, windows), len(self._digests) - 1)
            if (self._digests[places] == windows).any():
                return True
        return False


def canary(number: int) -> str:
    return f"{MARK}-{number}@example.org"


def planted() -> Iterator[event_pb2.Event]:
    """Yields COUNT events, each with canaries of its own wherever a person's data may stand."""
    for number in range(COUNT):
        event = event_pb2.Event(event_id=uuid7(), user_id=canary(number), session_id=f"{MARK}-visit-{number}")
        if number % 10 == 0:
            event.review.item_id, event.review.text = "lamp", f"{MARK}-words-{number} and more"
        elif number % 10 == 1:
            event.search.query = f"{MARK}-words-{number}"
        elif number % 10 == 2:
            event.support_question.text = f"{MARK}-words-{number}"
        elif number % 10 == 3:
            event.survey.nps, event.survey.comment = 3, f"{MARK}-words-{number}"
        elif number % 10 == 4:
            # Refused, and named in the answer; the log of the service must not name it.
            event.rating.item_id, event.rating.stars = "lamp", 77
        elif number % 10 == 5:
            event.item_view.item_id, event.user_id = "lamp", canary(number) + "\x00"
        else:
            event.item_view.item_id = "lamp"
        yield event


def planted_strings() -> list[str]:
    strings = [canary(number) for number in range(COUNT)]
    strings += [f"{MARK}-visit-{number}" for number in range(COUNT)]
    strings += [f"{MARK}-words-{number}" for number in range(COUNT)]
    return strings + [f"{MARK}-words-{number} and more" for number in range(0, COUNT, 10)]


def dumped_tables(url: str) -> bytes:
    """Returns the rows of every table of the suite as text, and what the planner remembers of them."""
    dump = bytearray()
    with psycopg.connect(url) as connection:
        connection.execute("ANALYZE")
        tables = connection.execute(
            "SELECT schemaname, tablename FROM pg_tables WHERE schemaname IN ('feedback', 'public')"
        ).fetchall()
        assert ("feedback", "events_default") in tables
        for schema, table in tables:
            query = sql.SQL("COPY (SELECT t::text FROM {} AS t) TO STDOUT").format(
                sql.Identifier(schema, table)
            )
            with connection.cursor().copy(query) as lines:
                for line in lines:
                    dump += line
        with connection.cursor().copy(
            "COPY (SELECT s::text FROM pg_stats AS s WHERE schemaname = 'feedback') TO STDOUT"
        ) as lines:
            for line in lines:
                dump += line
    return bytes(dump)


def position(url: str) -> int:
    """Returns how far the write-ahead log has come, in bytes."""
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
    assert row is not None
    return int(row[0])


def write_ahead_log(url: str, start: int) -> bytes:
    """Returns the log from a position to its end, from the segment files."""
    with psycopg.connect(url, autocommit=True) as connection:
        end = position(url)
        ((directory, size, compression),) = connection.execute(
            "SELECT current_setting('data_directory'), pg_size_bytes(current_setting('wal_segment_size')), "
            "current_setting('wal_compression')"
        ).fetchall()
        # A compressed page would hide what it holds.
        assert compression == "off"
        log = b""
        for segment in range(start // size, end // size + 1):
            row = connection.execute(
                "SELECT pg_walfile_name('0/0'::pg_lsn + %s::numeric)", (segment * size + 1,)
            ).fetchone()
            assert row is not None
            log += (Path(directory) / "pg_wal" / row[0]).read_bytes()
    base = start // size * size
    return log[start - base : end - base]


def server_log_of_postgres(url: str) -> bytes:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT current_setting('data_directory')").fetchone()
    assert row is not None
    return b"".join(path.read_bytes() for path in Path(row[0]).glob("*log*") if path.is_file())


def test_no_raw_id_and_no_text_is_found_behind_the_door(
    postgres_server: str, database_url: str, keys_dir: Path, tmp_path: Path
) -> None:
    if "host=/" not in psycopg.conninfo.make_conninfo(postgres_server):
        pytest.skip("the files of this PostgreSQL cannot be read; use the embedded one")
    searcher = Searcher(planted_strings())
    start = position(database_url)
    (tmp_path / "imports").mkdir()
    rows = "\n".join(f"{canary(n)},lamp,{'when' if n % 3 else 1_700_000_000 + n}" for n in range(300))
    (tmp_path / "imports" / "views.csv").write_text(f"who,what,when\n{rows}\n")
    nursery = Nursery()
    try:
        port = nursery.start(
            database_url, keys_dir, tmp_path, SHOPKEEPER_LOG_LEVEL="debug", SHOPKEEPER_IMPORT_DIRECTORY=str(tmp_path / "imports")
        )  # fmt: skip
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            plant(feedback_service_pb2_grpc.FeedbackServiceStub(channel))
        nursery.kill(15)
    finally:
        nursery.close()

    tables, wal = dumped_tables(database_url), write_ahead_log(database_url, start)
    log = (tmp_path / "server.log").read_bytes()
    # There is something to be searched: each stored event takes more than this.
    assert len(tables) > 7_000 * 150
    assert len(wal) > 7_000 * 150
    assert b"call failed" in log
    assert searcher.found(tables) == set()
    assert searcher.found(wal) == set()
    assert searcher.found(log + server_log_of_postgres(database_url)) == set()

    # The search would have found them.
    strings = [canary(4711), f"{MARK}-words-11"]
    start = position(database_url)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE public.leak (secret text, digest bytea)")
        for string in strings:
            digest = hashlib.sha256(string.encode())
            for text in (string, string.encode().hex(), base64.b64encode(string.encode()).decode()):
                connection.execute("INSERT INTO public.leak VALUES (%s, %s)", (text, digest.digest()))
    everything = {"raw", "hexadecimal", "base64, shifted by 0"}
    assert searcher.found(dumped_tables(database_url)) == everything | {"SHA-256 in hexadecimal"}
    assert searcher.found(write_ahead_log(database_url, start)) == everything | {"SHA-256"}
    assert searcher.found(log + base64.b64encode(hashlib.sha256(strings[0].encode()).digest())) == {
        "SHA-256 in base64"
    }


def plant(stub: Any) -> None:
    """Sends the canaries by every way in, and on every way that fails."""
    events = list(planted())
    for start in range(0, COUNT, 1_000):
        batch = events[start : start + 1_000]
        statuses = [result.status for result in record(stub, batch)]
        assert statuses.count(STORED) == 800
    assert {result.status for result in record(stub, events[:4])} == {DUPLICATE}
    # The same ids with other content, and a batch that is too large.
    for event in (batch := events[:4]):
        event.device = 3
    record(stub, batch)
    with pytest.raises(grpc.RpcError):
        record(stub, events[:1_001])
    people = [canary(number) for number in range(8)]
    for person in people:
        consent = consent_pb2.Consent(training=False)
        stub.SetConsent(feedback_service_pb2.SetConsentRequest(user_id=person, consent=consent), timeout=20)
        list(stub.ExportUser(feedback_service_pb2.ExportUserRequest(user_id=person), timeout=20))
    stub.ForgetUser(feedback_service_pb2.ForgetUserRequest(user_id=people[0]), timeout=20)
    with pytest.raises(grpc.RpcError):
        stub.GetConsent(feedback_service_pb2.GetConsentRequest(user_id=people[0] + "\x01"), timeout=20)
    mapping = import_pb2.ColumnMapping(
        user_id_column="who", occurred_at_column="when", item_id_column="what",
        default_kind=event_kind_pb2.EVENT_KIND_ITEM_VIEW,
    )  # fmt: skip
    source = import_pb2.ImportSource(path="views.csv", mapping=mapping)
    begun = stub.ImportEvents(feedback_service_pb2.ImportEventsRequest(source=source), timeout=20)
    wanted = feedback_service_pb2.GetImportRequest(import_id=begun.import_id)
    ended = eventually(lambda: (one := stub.GetImport(wanted, timeout=20)).HasField("end_time") and one, 30)
    # Two thirds have no time, and one row is of the person who was forgotten.
    assert (ended.stored_count, ended.rejected_count) == (99, 201)


def record(stub: Any, events: list[event_pb2.Event]) -> Any:
    return stub.RecordEvents(feedback_service_pb2.RecordEventsRequest(events=events), timeout=60).results
