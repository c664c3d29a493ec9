"""A caller's trace goes on down to the SQL, and tells nothing of a person."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import grpc
from shopkeeper.feedback.v1 import feedback_service_pb2, feedback_service_pb2_grpc

from tests.collector import collecting
from tests.conftest import REPOSITORY
from tests.feedback.conftest import eventually, item_view

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER_SPAN = "b7ad6b7169203331"
PERSON = "a-person-of-flesh-and-blood"


def test_a_trace_goes_from_the_caller_to_the_statement(
    database_url: str, keys_dir: Path, tmp_path: Path
) -> None:
    log = tmp_path / "server.log"
    with collecting() as (collector, endpoint), log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.feedback"],
            cwd=REPOSITORY,
            env={
                **os.environ,
                "DATABASE_URL": database_url,
                "SHOPKEEPER_HOME": str(tmp_path),
                "SHOPKEEPER_KEYS": str(keys_dir),
                "SHOPKEEPER_LISTEN": "127.0.0.1:0",
                "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            },
            stderr=output,
        )
        try:
            found = eventually(
                lambda: re.search(r"feedback ready on (127\.0\.0\.1:\d+)", log.read_text()), 60
            )
            metadata = (("traceparent", f"00-{TRACE_ID}-{CALLER_SPAN}-01"),)
            with grpc.insecure_channel(found[1]) as channel:
                stub = feedback_service_pb2_grpc.FeedbackServiceStub(channel)
                stub.RecordEvents(
                    feedback_service_pb2.RecordEventsRequest(events=[item_view(PERSON)]),
                    timeout=20,
                    metadata=metadata,
                )
                stub.GetConsent(
                    feedback_service_pb2.GetConsentRequest(user_id=PERSON), timeout=20, metadata=metadata
                )
            process.send_signal(signal.SIGTERM)
            process.wait(30)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(10)
    own = {span.span_id.hex(): span for span in collector.spans if span.trace_id.hex() == TRACE_ID}
    calls = {
        span.name.rpartition("/")[2]: span
        for span in own.values()
        if span.parent_span_id.hex() == CALLER_SPAN
    }
    assert set(calls) == {"RecordEvents", "GetConsent"}
    statements = [span for span in own.values() if _attribute(span, "db.system.name") == "postgresql"]
    reads = [span for span in statements if "consents" in _attribute(span, "db.query.text")]
    assert reads, "the statement that read the consent is a span"
    assert {span.parent_span_id for span in reads} == {calls["GetConsent"].span_id}
    commits = [span for span in own.values() if span.name == "group commit"]
    assert [span.parent_span_id for span in commits] == [calls["RecordEvents"].span_id]
    assert _attribute(commits[0], "shopkeeper.events") == "1"
    assert PERSON.encode() not in b"".join(span.SerializeToString() for span in collector.spans)


def _attribute(span: object, key: str) -> str:
    for attribute in span.attributes:  # type: ignore[attr-defined]
        if attribute.key == key:
            return str(attribute.value.string_value or attribute.value.int_value)
    return ""
