"""A small shop for the tests: bundles with weights worked out by hand, and a profile service in memory.

The profile service is a stand-in behind a real socket: it implements the two
streams and `GetProfile` of the contract, and can be told what happens.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from shopkeeper.profile.v1 import (
    catalog_service_pb2,
    catalog_service_pb2_grpc,
    item_pb2,
    live_profile_pb2,
    profile_service_pb2,
    profile_service_pb2_grpc,
)
from shopkeeper.recommend.v1 import recommend_service_pb2_grpc

from services.recommend.__main__ import RecommendService
from services.recommend.settings import RecommendSettings
from shared.bundle import Ranker, Registry, write_bundle
from shared.bundle.arrays import encode_arrays
from shared.bundle.ranker import RANKER, RANKER_FORMAT, TASKS
from shared.bundle.ranker_features import FEATURES
from shared.bundle.registry import write_atomically
from shared.bundle.sum_encoder import build_sum_encoder
from shared.channel import open_channel
from shared.errors import ShopkeeperError
from shared.event_kinds import EventKind
from shared.keys import read_signing_key
from shared.privacy import Pseudonymizer
from shared.telemetry import Telemetry
from shared.tokens import ConsistencyToken, TokenSigner, Watermark

MAX_HISTORY = 8


def publish(
    registry: Path,
    keys: Path,
    item_ids: Sequence[str],
    vectors_ID: np.ndarray,
    *,
    pairs: dict[tuple[str, str], float] | None = None,
    popularity: Sequence[float] | None = None,
    lambda_: float = 1.0,
    alias: bool = True,
    encoder: bytes | None = None,
    max_history: int = MAX_HISTORY,
    further_arrays: dict[str, np.ndarray] | None = None,
    further_scoring: dict[str, float] | None = None,
    ranker: Ranker | None = None,
) -> str:
    """Publishes a bundle with these weights and returns its version.

    Args:
        pairs: co-occurrence weights by (earlier item, later item).
        further_arrays, further_scoring: backward counts and attribute factors, and their weights.
        ranker: the second stage.
    """
    item_count, dimension = vectors_ID.shape
    index_of = {item_id: n for n, item_id in enumerate(item_ids)}
    rows: list[list[tuple[int, float]]] = [[] for _ in item_ids]
    for (earlier, later), weight in (pairs or {}).items():
        rows[index_of[earlier]].append((index_of[later], weight))
    lengths = [len(row) for row in rows]
    flat = [entry for row in rows for entry in sorted(row)]
    version = write_bundle(
        Registry(registry),
        "main",
        arrays={
            "item_vectors": vectors_ID.astype(np.float32),
            "item_bias": np.zeros(item_count, np.float32),
            "popularity": np.array(
                popularity if popularity is not None else range(item_count, 0, -1), np.float32
            ),
            "cooccurrence_indptr": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "cooccurrence_indices": np.array([column for column, _ in flat], np.int32),
            "cooccurrence_weights": np.array([weight for _, weight in flat], np.float32),
            **(further_arrays or {}),
        },
        vocabulary=list(item_ids),
        encoder_bytes=encoder or build_sum_encoder(max_history, dimension),
        manifest_fields={
            "encoder": {"max_history": max_history, "dimension": dimension},
            "scoring": {
                "lambda": lambda_,
                "scale": 30.0,
                "query_decay": 0.6065,
                "window": 50,
                **(further_scoring or {}),
            },
            "ranker": {
                "format": RANKER_FORMAT,
                "features": list(FEATURES),
                "tasks": list(TASKS),
                "weights": {"click": 1.0, "cart": 0.0, "purchase": 0.0},
            },
        },
        attachments={} if ranker is None else {RANKER: encode_arrays(ranker.to_arrays())},
        signing_key=read_signing_key(keys),
    )
    if alias:
        point(registry, version)
    return version


def point(registry: Path, version: str, alias: str = "production") -> None:
    """Points the alias at a version, as a promotion does, without asking whether the version is whole."""
    path = registry / "main" / "aliases" / f"{alias}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    change = {"version": version, "previous": None, "changed_at": now, "reason": "PROMOTED", "comment": ""}
    write_atomically(path, json.dumps({**change, "history": [change]}).encode())


class FakeProfile(
    profile_service_pb2_grpc.ProfileServiceServicer, catalog_service_pb2_grpc.CatalogServiceServicer
):
    """Profile and catalogue in memory. `hold` keeps events out of the stream until `release`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._histories: dict[bytes, list[live_profile_pb2.HistoryEvent]] = {}
        self._changes: list[tuple[int, bytes]] = []
        self._items: dict[str, item_pb2.Item] = {}
        self._item_changes: list[str] = []
        self._xid = 100
        self._held = False
        self._running = True
        self.get_profile_calls = 0
        self.answers_calls = True
        self.hangs = threading.Event()
        self.log_read_at: float | None = None
        self.lags = False
        self.consents: dict[bytes, bool] = {}
        self.vectors: dict[str, list[float]] = {}
        self.vector_version = "space-1"
        self.segments: dict[bytes, list[str]] = {}
        self.stages: dict[bytes, int] = {}

    def record(self, user_key: bytes, *events: tuple[str, EventKind], at: float | None = None) -> int:
        """Appends events of a shopper and returns the xid of their commit."""
        with self._changed:
            self._xid += 1
            for item_id, kind in events:
                event = live_profile_pb2.HistoryEvent(kind=int(kind), item_id=item_id)
                event.occurred_at.FromNanoseconds(int((time.time() if at is None else at) * 1e9))
                self._histories.setdefault(user_key, []).append(event)
            self._changes.append((self._xid, user_key))
            self._changed.notify_all()
            return self._xid

    def upsert(self, *items: item_pb2.Item) -> None:
        with self._changed:
            for item in items:
                item.update_time.FromNanoseconds(time.time_ns())
                self._items[item.item_id] = item
                self._item_changes.append(item.item_id)
            self._changed.notify_all()

    def delete(self, item_id: str) -> None:
        with self._changed:
            self._items.pop(item_id, None)
            self._item_changes.append(item_id)
            self._changed.notify_all()

    def hold(self) -> None:
        with self._changed:
            self._held = True

    def release(self) -> None:
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._running = False
            self._changed.notify_all()

    def WatchProfiles(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        sent = Watermark.decode(request.resume_watermark).xmax - 1 if request.resume_watermark else None
        if sent is None:
            sent = self._xid
            yield profile_service_pb2.WatchProfilesResponse(reset=True, watermark=self._watermark(sent))
        while context.is_active() and self._running:
            with self._changed:
                if not self._held and self._xid == sent:
                    self._changed.wait(0.1)
                until = sent if self._held else self._xid
                keys = {key for xid, key in self._changes if sent < xid <= until}
                changed = [self._live(key, until) for key in keys]
                sent = until
            if self._held:
                time.sleep(0.02)
            message = profile_service_pb2.WatchProfilesResponse(
                changed=changed, watermark=self._watermark(sent)
            )
            read_at = time.time() if self.log_read_at is None else self.log_read_at
            message.watermark_time.FromNanoseconds(int(read_at * 1e9))
            yield message

    def GetProfile(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.get_profile_calls += 1
        if not self.answers_calls:
            context.abort(grpc.StatusCode.UNAVAILABLE, "told to fail")
        while self.hangs.is_set() and context.is_active():
            time.sleep(0.02)
        if self.lags:
            old = live_profile_pb2.LiveProfile(
                user_key=request.user_key, watermark=self._watermark(1), personalisation=True
            )
            return profile_service_pb2.Profile(user_key=request.user_key, live=old)
        with self._changed:
            return profile_service_pb2.Profile(
                user_key=request.user_key, live=self._live(request.user_key, self._xid)
            )

    def WatchItems(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        if request.resume_token:
            sent = int(request.resume_token)
        else:
            with self._changed:
                sent, items = len(self._item_changes), list(self._items.values())
            yield self._with_vectors(
                request,
                catalog_service_pb2.WatchItemsResponse(
                    reset=True, upserted=items, snapshot_complete=True, watermark=str(sent).encode()
                ),
            )
        while context.is_active() and self._running:
            with self._changed:
                if len(self._item_changes) == sent:
                    self._changed.wait(0.1)
                changes = self._item_changes[sent:]
                sent = len(self._item_changes)
                upserted = [self._items[item] for item in changes if item in self._items]
                deleted = [item for item in changes if item not in self._items]
            yield self._with_vectors(
                request,
                catalog_service_pb2.WatchItemsResponse(
                    upserted=upserted,
                    deleted_item_ids=deleted,
                    snapshot_complete=True,
                    watermark=str(sent).encode(),
                ),
            )

    def _with_vectors(self, request: Any, message: Any) -> Any:
        for item in message.upserted if request.with_vectors else ():
            if item.item_id in self.vectors:
                message.vectors.add(item_id=item.item_id, values=self.vectors[item.item_id])
                message.vector_version = self.vector_version
        return message

    def _live(self, user_key: bytes, xid: int) -> live_profile_pb2.LiveProfile:
        consent = self.consents.get(user_key, True)
        history = sorted(
            self._histories.get(user_key, []), key=lambda event: event.occurred_at.ToNanoseconds()
        )
        live = live_profile_pb2.LiveProfile(
            user_key=user_key,
            history=history[::-1][:200] if consent else [],
            watermark=self._watermark(xid),
            personalisation=consent,
        )
        live.summary.segment_ids.extend(self.segments.get(user_key, ()))
        live.summary.life_cycle_stage = self.stages.get(user_key, 0)  # type: ignore[assignment]
        return live

    @staticmethod
    def _watermark(xid: int) -> bytes:
        return Watermark(xid + 1, xid + 1).encode()


class ProfileServer:
    """The stand-in on a socket; killed and started again on the same port."""

    def __init__(self, profile: FakeProfile, port: int = 0) -> None:
        self.profile = profile
        self._server: grpc.Server | None = None
        self.port = port
        self.start()

    def start(self) -> None:
        self.profile._running = True
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=16), options=[("grpc.so_reuseport", 0)]
        )
        profile_service_pb2_grpc.add_ProfileServiceServicer_to_server(self.profile, self._server)
        catalog_service_pb2_grpc.add_CatalogServiceServicer_to_server(self.profile, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def kill(self) -> None:
        if self._server is not None:
            self.profile.stop()
            self._server.stop(0).wait()
            self._server = None


class Shop:
    """A recommend service on a socket, with everything that it depends on."""

    def __init__(self, keys: Path, home: Path, **settings: Any) -> None:
        self.keys = keys
        self.registry = home / "registry"
        self.profile = FakeProfile()
        self.profile_server = ProfileServer(self.profile)
        self.signer = TokenSigner.from_directory(keys)
        self._pseudonymizer = Pseudonymizer.from_directory(keys)
        defaults: dict[str, Any] = {
            "home": home,
            "keys": keys,
            "listen": "127.0.0.1:0",
            "profile_address": f"127.0.0.1:{self.profile_server.port}",
            "registry_poll_seconds": 0.02,
            "log_level": "error",
        }
        self.settings = RecommendSettings(**(defaults | settings))
        self.service: RecommendService | None = None

    def start(self) -> Shop:
        """Starts the service and waits until it has heard of the catalogue."""
        self.service = RecommendService(self.settings, Telemetry("recommend", self.settings))
        port = self.service.start()
        self._channel = open_channel(f"127.0.0.1:{port}")
        self.stub = recommend_service_pb2_grpc.RecommendServiceStub(self._channel)
        if self.profile_server._server is not None:
            eventually(lambda: self.service.catalog.state().complete)  # type: ignore[union-attr]
            eventually(lambda: self.service.profiles.state().connected)  # type: ignore[union-attr]
        return self

    def user_key(self, user_id: str) -> bytes:
        return bytes(self._pseudonymizer.user_key(user_id))

    def token(self, xid: int) -> str:
        return ConsistencyToken(xid).sign(self.signer)

    def publish(self, item_ids: Sequence[str], vectors_ID: np.ndarray, **options: Any) -> str:
        """Publishes a bundle; with the service running, waits until it is in service."""
        version = publish(self.registry, self.keys, item_ids, vectors_ID, **options)
        if self.service is not None and options.get("alias", True):
            eventually(lambda: self.service.models.state().version == version)  # type: ignore[union-attr]
        return version

    def close(self) -> None:
        if self.service is not None:
            self._channel.close()
            self.service.stop()
        self.profile_server.kill()


def eventually(condition: Any, seconds: float = 10.0) -> None:
    """Waits until a condition holds; fails where it does not within the time."""
    deadline = time.monotonic() + seconds
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = condition()
        except (AssertionError, ShopkeeperError) as error:
            last = error
        if last and not isinstance(last, Exception):
            return
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s; at last: {last!r}")


def item(item_id: str, **fields: Any) -> item_pb2.Item:
    """Returns a record with a title; `price` in units."""
    if "price" in fields:
        fields["price_micros"] = round(fields.pop("price") * 1_000_000)
        fields.setdefault("currency_code", "EUR")
    return item_pb2.Item(item_id=item_id, title=fields.pop("title", f"Title of {item_id}"), **fields)


def ids(response: Any) -> list[str]:
    """Returns the ids of an answer's items, in order."""
    return [entry.item_id for entry in response.items]


def causes(response: Any) -> set[str]:
    """Returns what an answer went without, by name."""
    from shopkeeper.recommend.v1.recommendation_pb2 import Degradation

    return {Degradation.Cause.Name(entry.cause).removeprefix("CAUSE_") for entry in response.degraded}
