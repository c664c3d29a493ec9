"""The master key is replaced while people's texts stay readable, whatever is cut in between."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2, feedback_service_pb2_grpc

from services.feedback.__main__ import Feedback, wire
from services.feedback.servicer import SERVICE_NAME
from services.feedback.settings import FeedbackSettings
from services.feedback.storage.master_key import rewrap_data_keys
from services.feedback.storage.text_cipher import TextCipher
from shared.database import Database
from shared.errors import DataLoss
from tests.conftest import REPOSITORY
from tests.feedback.conftest import Shop, event

PEOPLE = [f"person-{number}" for number in range(7)]


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url, schema="feedback")
    yield database
    database.close()


def review(person: str) -> event_pb2.Event:
    return event(person, review=event_pb2.Review(item_id="lamp", text=f"words of {person}"))


def texts(stub: feedback_service_pb2_grpc.FeedbackServiceStub, person: str) -> list[str]:
    parts = stub.ExportUser(feedback_service_pb2.ExportUserRequest(user_id=person), timeout=20)
    lines = [json.loads(line) for part in parts for line in part.json_lines]
    return [line["text"] for line in lines if line["type"] == "event"]


def changed_places(keys: Path, directory: Path) -> Path:
    """Returns keys whose master key is a new one, and whose other is the former."""
    shutil.copytree(keys, directory)
    (directory / "master_key.hex").rename(directory / "master_key.other.hex")
    (directory / "master_key.hex").write_text(secrets.token_hex(32))
    return directory


def test_texts_are_readable_before_during_and_after(
    shop: Shop, database: Database, tmp_path: Path, serve: Callable[..., grpc.Channel]
) -> None:
    shop.record(*map(review, PEOPLE))
    keys = changed_places(shop.keys, tmp_path / "new-keys")
    started: list[Feedback] = []

    def served(name: str) -> feedback_service_pb2_grpc.FeedbackServiceStub:
        settings = FeedbackSettings(
            listen="127.0.0.1:0", log_level="warning", keys=keys, registry=tmp_path / name
        )
        feedback = wire(settings, shop.url)
        started.append(feedback)
        channel = serve(feedback.register, service_names=(SERVICE_NAME,), settings=settings)
        return feedback_service_pb2_grpc.FeedbackServiceStub(channel)

    during = served("during")
    assert [texts(during, person) for person in PEOPLE] == [[f"words of {person}"] for person in PEOPLE]
    during.RecordEvents(feedback_service_pb2.RecordEventsRequest(events=[review("newcomer")]), timeout=20)
    former = TextCipher(bytes.fromhex((keys / "master_key.other.hex").read_text()))
    present = TextCipher(bytes.fromhex((keys / "master_key.hex").read_text()))
    under = shop.sql("SELECT uuid_send(key_id), wrapped_key FROM feedback.data_keys")
    assert sum(unwraps(former, *row) for row in under) == len(PEOPLE)
    assert sum(unwraps(present, *row) for row in under) == 1, "what is new is under the new key"
    both = TextCipher.from_directory(keys)
    assert rewrap_data_keys(database, both, page_rows=3) == (len(PEOPLE), len(PEOPLE) + 1)
    assert rewrap_data_keys(database, both, page_rows=3) == (0, len(PEOPLE) + 1)
    (keys / "master_key.other.hex").unlink()
    after = served("after")
    assert [texts(after, person) for person in PEOPLE] == [[f"words of {person}"] for person in PEOPLE]
    under = shop.sql("SELECT uuid_send(key_id), wrapped_key FROM feedback.data_keys")
    assert not any(unwraps(former, *row) for row in under)
    for feedback in started:
        feedback.close()


def test_a_rewrapping_that_is_cut_goes_on_where_it_was(
    shop: Shop, database: Database, tmp_path: Path
) -> None:
    shop.record(*map(review, PEOPLE))
    both = TextCipher.from_directory(changed_places(shop.keys, tmp_path / "new-keys"))
    last = shop.sql("SELECT key_id FROM feedback.data_keys ORDER BY key_id DESC LIMIT 1")[0][0]
    whole = shop.sql("SELECT wrapped_key FROM feedback.data_keys WHERE key_id = %s", last)[0][0]
    shop.sql("UPDATE feedback.data_keys SET wrapped_key = %s WHERE key_id = %s", b"altered" + whole[7:], last)
    with pytest.raises(DataLoss):
        rewrap_data_keys(database, both, page_rows=2)
    shop.sql("UPDATE feedback.data_keys SET wrapped_key = %s WHERE key_id = %s", whole, last)
    # Seven in pages of two: six were done.
    assert rewrap_data_keys(database, both, page_rows=2) == (1, len(PEOPLE))


def test_the_command_says_what_it_did(shop: Shop, tmp_path: Path) -> None:
    shop.record(*map(review, PEOPLE))
    keys = changed_places(shop.keys, tmp_path / "new-keys")

    def run() -> str:
        environment = {**os.environ, "DATABASE_URL": shop.url, "SHOPKEEPER_KEYS": str(keys)}
        command = [sys.executable, "-m", "services.feedback", "rewrap-keys"]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run().startswith("7 of 7 data keys wrapped anew")
    assert run().startswith("0 of 7 data keys wrapped anew")


def unwraps(cipher: TextCipher, key_id: bytes, wrapped: bytes) -> bool:
    try:
        cipher.unwrap(wrapped, key_id)
    except DataLoss:
        return False
    return True
