"""What the README shows a newcomer works as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.suite import Suite

README = Path(__file__).resolve().parents[2] / "README.md"
FEEDBACK = README.parent / "docs" / "feedback.md"

pytestmark = pytest.mark.slow


def test_the_first_integration_of_the_readme_prints_recommendations(trained: Suite) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    for name, port in (("feedback", 7001), ("recommend", 7004)):
        assert f"127.0.0.1:{port}" in program
        program = program.replace(f"127.0.0.1:{port}", f"127.0.0.1:{trained.ports[name]}")
    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert len(lines) == 10
    assert re.fullmatch(r"1 \S+ -?[0-9.]+ \S.*", lines[0])


def test_the_program_of_the_page_of_feedback_records_exports_and_forgets(trained: Suite) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", FEEDBACK.read_text(), re.MULTILINE | re.DOTALL)
    assert "127.0.0.1:7001" in program
    program = program.replace("127.0.0.1:7001", f"127.0.0.1:{trained.ports['feedback']}")
    outcome = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert lines[0].split()[0] == "EVENT_STATUS_STORED"
    assert lines[1].split() == ["EVENT_STATUS_REJECTED", "EVENT_REASON_UNKNOWN_KIND", "events[1].detail"]
    assert lines[2].split()[0] == "EVENT_STATUS_DUPLICATE"
    assert [json.loads(line)["type"] for line in lines[4:6]] == ["consent", "event"]
    assert lines[6] == "{'consents': 1, 'data_keys': 0, 'events': 1}"


def test_the_requests_of_the_grpcurl_example_are_legal(trained: Suite) -> None:
    """grpcurl turns JSON into the message that reflection describes; so does protobuf's own JSON parser."""
    from google.protobuf import json_format
    from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2
    from shopkeeper.recommend.v1 import recommend_service_pb2

    bodies = re.findall(r"-d '(\{.*?\})' *\\?\n? *127", README.read_text(), re.DOTALL)
    record, recommend = (body.replace("'$(date -u +%FT%TZ)'", "2026-01-01T00:00:00Z") for body in bodies)
    recorded = trained.feedback.RecordEvents(
        json_format.Parse(record, feedback_service_pb2.RecordEventsRequest()), timeout=10
    )
    assert recorded.results[0].status == event_pb2.EVENT_STATUS_STORED
    answer = trained.recommend.Recommend(
        json_format.Parse(recommend, recommend_service_pb2.RecommendRequest()), timeout=10
    )
    assert len(answer.items) == 5
