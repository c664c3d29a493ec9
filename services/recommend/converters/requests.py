"""Requests to queries: every field is checked here, and named when it is wrong."""

from __future__ import annotations

import functools
import hashlib
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.descriptor import Descriptor
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb

from services.recommend.converters.filter_language import MAX_CHARACTERS
from services.recommend.domain.recommendation import ContextEvent, ListKind, Page, Query
from shared.errors import FieldViolation, InvalidInput
from shared.event_kinds import EventKind
from shared.identity import UserKey, normalise_item_id, normalise_user_id, parse_user_key
from shared.privacy import Pseudonymizer
from shared.tokens import ConsistencyToken, TokenSigner

MAX_PAGE_SIZE = 100
MAX_CONTEXT_EVENTS = 100
MAX_LIST_SIZE = 1_000
DEFAULT_LIST_SIZE = 100
MAX_LISTED_ITEMS = 1_000
MAX_TOGETHER_ITEMS = 100
MAX_VARIANT_BYTES = 128
MAX_BATCH_USERS = 10_000
MAX_EMBEDDED_USERS = 100
MIN_WINDOW_SECONDS = 600
MAX_WINDOW_SECONDS = 30 * 86_400
DEFAULT_WINDOW_SECONDS = 86_400

PAGE_KIND = "recommend_page"
_LIST_KIND = "recommend_list"
_NAME = re.compile(r"^[a-z][a-z0-9_-]{0,62}$")
_BATCH_KIND = "recommend_batch"
_BATCH_HEAD = struct.Struct(">16sI")
_PAGE_HEAD = struct.Struct(">16sIqB")
_DEFAULT_PLACEMENT = {
    ListKind.RECOMMEND: "home",
    ListKind.SIMILAR: "item_page",
    ListKind.TOGETHER: "item_page",
    ListKind.BUY_AGAIN: "home",
    ListKind.TRENDING: "home",
    ListKind.CART: "cart",
}
_SERVING_CONFIG = {
    ListKind.SIMILAR: "similar",
    ListKind.TOGETHER: "similar",
    ListKind.TRENDING: "popular",
    ListKind.BUY_AGAIN: "default",
}
_ENUM_VALUES = {
    "filter_mode": frozenset(pb.FilterMode.values()),
    "item_view": frozenset(pb.ItemView.values()),
}
_KINDS = frozenset(int(kind) for kind in EventKind)


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch under way.

    Attributes:
        first: the shopper to go on with, from 0.
        model_version: that made the answers before; None where there were none.
    """

    serving_config: str
    first: int
    model_version: str | None
    fingerprint: bytes


class RequestConverter:
    """Makes queries of requests.

    Args:
        pseudonymizer: turns raw user ids into keys; a raw id goes no further.
        signer: verifies page and consistency tokens.
    """

    def __init__(self, pseudonymizer: Pseudonymizer, signer: TokenSigner) -> None:
        self._pseudonymizer = pseudonymizer
        self._signer = signer

    def query(self, kind: ListKind, request: Any, prefix: str = "") -> Query:
        """Returns the query of a request of any of the calls that recommend.

        Args:
            prefix: path of the message within the request, such as `request.`.

        Raises:
            InvalidInput: INVALID_REQUEST, INVALID_ID, INVALID_TOKEN; every violation that was found.
        """
        check = Checker(prefix)
        fields = _fields_of(request.DESCRIPTOR)
        user_key = self._user_key(request, check) if "user_key" in fields else None
        if kind is ListKind.BUY_AGAIN and user_key is None and not check.violations:
            check.wrong("user", "is not set; send user_id or user_key")
        item_ids: tuple[str, ...] = ()
        if kind is ListKind.SIMILAR:
            item_ids = check.items("item_id", [request.item_id], 1)
        elif kind is ListKind.TOGETHER:
            item_ids = check.items("item_ids", request.item_ids, MAX_TOGETHER_ITEMS, required=True)
        elif kind is ListKind.CART:
            item_ids = check.items("cart_item_ids", request.cart_item_ids, MAX_LISTED_ITEMS, required=True)
        cart: tuple[str, ...] = ()
        if "cart_item_ids" in fields and kind is not ListKind.CART:
            cart = check.items("cart_item_ids", request.cart_item_ids, MAX_LISTED_ITEMS)
        placement = check.name("placement", request.placement, _DEFAULT_PLACEMENT[kind])
        serving_config = _SERVING_CONFIG.get(kind, "default")
        if "serving_config" in fields:
            serving_config = check.name("serving_config", request.serving_config, "default")
        consistency, consistency_text = None, ""
        if "consistency_token" in fields and request.consistency_token:
            consistency_text = request.consistency_token
            with check.catching():
                consistency = ConsistencyToken.verify(
                    self._signer, consistency_text, check.path("consistency_token")
                )
        fill_up = False
        if "filter_mode" in fields:
            check.known_enum("filter_mode", request)
            fill_up = request.filter_mode == pb.FILTER_MODE_FALLBACK
        check.known_enum("item_view", request)
        is_recommend = kind is ListKind.RECOMMEND
        context_item_id = ""
        if is_recommend and request.context_item_id:
            context_item_id = "".join(check.items("context_item_id", [request.context_item_id], 1))
        query = Query(
            kind=kind,
            user_key=user_key,
            placement=placement,
            serving_config=serving_config,
            item_ids=item_ids,
            page_size=check.page_size(request.page_size),
            filter_text=check.filter(request.filter),
            fill_up=fill_up,
            context_events=self._context_events(request, check) if is_recommend else (),
            cart_item_ids=cart,
            exclude_item_ids=check.items("exclude_item_ids", request.exclude_item_ids, MAX_LISTED_ITEMS),
            consistency=consistency,
            consistency_text=consistency_text,
            seed=request.seed if is_recommend else 0,
            explained=request.include_explanations,
            traced=request.include_trace if is_recommend else False,
            with_records=request.item_view != pb.ITEM_VIEW_ID,
            context_item_id=context_item_id,
            variant=check.variant(request.variant),
            assignable="serving_config" in fields and not request.serving_config and not request.variant,
            window_seconds=check.window(request) if kind is ListKind.TRENDING else DEFAULT_WINDOW_SECONDS,
        )
        fingerprint, page = _fingerprint(query), query.page
        if request.page_token:
            with check.catching():
                page = self._page(request.page_token, fingerprint, check.path("page_token"))
        check.finish()
        # Not `replace`, which makes all of it anew: nobody else has seen this one yet.
        object.__setattr__(query, "fingerprint", fingerprint)
        object.__setattr__(query, "page", page)
        return query

    def explain_query(self, request: pb.ExplainRequest) -> tuple[Query, str]:
        """Returns the query and the item of an Explain request; raises as `query`."""
        check = Checker("")
        item_id = check.items("item_id", [request.item_id], 1)
        if request.request.page_token:
            check.wrong("request.page_token", "must be empty: the first page is explained")
        check.finish()
        return self.query(ListKind.RECOMMEND, request.request, "request."), item_id[0]

    def embedded_users(self, request: pb.EmbedUsersRequest) -> list[UserKey]:
        """Returns the shoppers of an EmbedUsers request; raises InvalidInput."""
        check = Checker("")
        if not 1 <= len(request.user_keys) <= MAX_EMBEDDED_USERS:
            check.wrong("user_keys", f"has {len(request.user_keys)} entries; send 1 to {MAX_EMBEDDED_USERS}")
        user_keys = []
        for index, user_key in enumerate(request.user_keys[:MAX_EMBEDDED_USERS]):
            with check.catching():
                user_keys.append(parse_user_key(user_key, f"user_keys[{index}]"))
        check.finish()
        return user_keys

    def page_token(self, query: Query, page: Page | None) -> str:
        """Returns the signed token of a page, "" for None."""
        if page is None:
            return ""
        version = page.model_version.encode()
        head = _PAGE_HEAD.pack(query.fingerprint, page.offset, page.seed, len(version))
        return self._signer.sign(PAGE_KIND, head + version + page.shown_digests.astype(">u4").tobytes())

    def batch(self, request: pb.BatchRecommendRequest) -> Batch:
        """Returns where a batch begins; raises InvalidInput as `query`, also for its template."""
        check = Checker("")
        template = request.template
        for field, is_set in (
            ("user", template.WhichOneof("user") is not None),
            ("page_token", bool(template.page_token)),
            ("consistency_token", bool(template.consistency_token)),
        ):
            if is_set:
                check.wrong(f"template.{field}", "must not be set in a batch")
        if not 1 <= len(request.users) <= MAX_BATCH_USERS:
            check.wrong("users", f"has {len(request.users)} entries; send 1 to {MAX_BATCH_USERS}")
        same = pb.BatchRecommendRequest(template=template, users=request.users)
        content = same.SerializeToString(deterministic=True)
        fingerprint = hashlib.blake2b(content, digest_size=16).digest()
        first, version = 0, None
        if request.resume_token:
            with check.catching():
                payload = self._signer.verify(_BATCH_KIND, request.resume_token, "resume_token")
                known, first = _BATCH_HEAD.unpack_from(payload)
                version = payload[_BATCH_HEAD.size :].decode()
                if known != fingerprint:
                    problem = "belongs to another batch; send all other fields unchanged."
                    raise InvalidInput(
                        "INVALID_TOKEN",
                        f"resume_token {problem}",
                        {"kind": _BATCH_KIND},
                        [FieldViolation("resume_token", problem, "INVALID_TOKEN")],
                    )
        check.finish()
        config = self.query(ListKind.RECOMMEND, template, "template.").serving_config
        return Batch(config, first, version, fingerprint)

    def batch_query(self, request: pb.BatchRecommendRequest, index: int) -> Query:
        """Returns the query of one shopper of a batch; raises as `query`."""
        user, check = request.users[index], Checker("")
        if user.WhichOneof("user") is None:
            check.wrong(f"users[{index}].user", "is not set; send user_id or user_key")
            check.finish()
        one = pb.RecommendRequest()
        one.CopyFrom(request.template)
        if user.WhichOneof("user") == "user_id":
            one.user_id = user.user_id
        else:
            one.user_key = user.user_key
        return self.query(ListKind.RECOMMEND, one, f"users[{index}].")

    def resume_token(self, batch: Batch, index: int, model_version: str) -> str:
        """Returns the signed token of a batch that goes on with a shopper."""
        return self._signer.sign(
            _BATCH_KIND, _BATCH_HEAD.pack(batch.fingerprint, index) + model_version.encode()
        )

    def after_token(self, after: str) -> str:
        """Returns the signed token of a list that goes on after an id, "" for ""."""
        return self._signer.sign(_LIST_KIND, after.encode()) if after else ""

    def after_of(self, page_token: str) -> str:
        """Returns the id after which a list goes on; raises InvalidInput INVALID_TOKEN."""
        return self._signer.verify(_LIST_KIND, page_token, "page_token").decode() if page_token else ""

    def _page(self, token: str, fingerprint: bytes, field: str) -> Page:
        payload = self._signer.verify(PAGE_KIND, token, field)
        known, offset, seed, version_bytes = _PAGE_HEAD.unpack_from(payload)
        if known != fingerprint:
            problem = "belongs to another request; send all other fields as on the first page."
            raise InvalidInput(
                "INVALID_TOKEN",
                f"{field} {problem}",
                {"kind": PAGE_KIND},
                [FieldViolation(field, problem, "INVALID_TOKEN")],
            )
        digests = payload[_PAGE_HEAD.size + version_bytes :]
        version = payload[_PAGE_HEAD.size : _PAGE_HEAD.size + version_bytes].decode()
        return Page(offset, version, seed, np.frombuffer(digests, ">u4").astype(np.uint32))

    def _user_key(self, request: Any, check: Checker) -> UserKey | None:
        which = request.WhichOneof("user")
        if which is None:
            return None
        with check.catching():
            if which == "user_id":
                field = check.path("user_id")
                return self._pseudonymizer.user_key(normalise_user_id(request.user_id, field), field)
            return parse_user_key(request.user_key, check.path("user_key"))
        return None

    @staticmethod
    def _context_events(request: pb.RecommendRequest, check: Checker) -> tuple[ContextEvent, ...]:
        if not request.context_events:
            return ()
        if len(request.context_events) > MAX_CONTEXT_EVENTS:
            check.wrong(
                "context_events",
                f"has {len(request.context_events)} entries; the most is {MAX_CONTEXT_EVENTS}: send the newest",
            )
            return ()
        events = []
        for n, event in enumerate(request.context_events):
            path = f"context_events[{n}]"
            kind = int(event.kind) or int(EventKind.ITEM_VIEW)
            if kind not in _KINDS:
                check.wrong(f"{path}.kind", f"{kind} is no EventKind")
                continue
            item = check.items(f"{path}.item_id", [event.item_id], 1)
            time = None
            if event.HasField("occur_time"):
                time = check.time(f"{path}.occur_time", event.occur_time)
            if item:
                events.append(ContextEvent(item[0], kind, time))
        return tuple(events)


def check_name(value: str, field: str) -> str:
    """Returns an id of a serving config or rule; raises InvalidInput where it is none."""
    check = Checker("")
    name = check.name(field, value, "")
    if not value:
        check.wrong(field, "is empty; send 1 to 63 characters of ^[a-z][a-z0-9_-]*$")
    check.finish()
    return name


def check_page_size(value: int) -> int:
    """Returns the page size of a list, 100 for 0; raises InvalidInput for a negative one."""
    if value < 0:
        check = Checker("")
        check.wrong("page_size", f"is {value}; send 0 for the default, or 1 to {MAX_LIST_SIZE}")
        check.finish()
    return min(value, MAX_LIST_SIZE) or DEFAULT_LIST_SIZE


@functools.cache
def _fields_of(descriptor: Descriptor) -> frozenset[str]:
    return frozenset(field.name for field in descriptor.fields)


class Checker:
    """Collects what is wrong with a request, so that all of it is told at once."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._first: InvalidInput | None = None
        self.violations: list[FieldViolation] = []

    def path(self, field: str) -> str:
        return self._prefix + field

    def wrong(self, field: str, problem: str) -> None:
        self.violations.append(FieldViolation(self.path(field), problem + ".", "INVALID_REQUEST"))

    def catching(self) -> _Catching:
        return _Catching(self)

    def caught(self, error: InvalidInput) -> None:
        self._first = self._first or error
        self.violations += error.violations

    def finish(self) -> None:
        if not self.violations:
            return
        reason = self._first.reason if self._first is not None else "INVALID_REQUEST"
        metadata = self._first.metadata if self._first is not None else {}
        first = self.violations[0]
        more = len(self.violations) - 1
        raise InvalidInput(
            reason,
            f"{first.field} {first.description}" + (f" And {more} more." if more else ""),
            metadata,
            self.violations,
        )

    def name(self, field: str, value: str, default: str) -> str:
        if not value:
            return default
        if not _NAME.match(value):
            self.wrong(field, "must be 1 to 63 characters of ^[a-z][a-z0-9_-]*$")
        return value

    def items(
        self, field: str, values: Iterable[str], limit: int, *, required: bool = False
    ) -> tuple[str, ...]:
        listed = list(values)
        if not listed and not required:
            return ()
        if required and not listed:
            self.wrong(field, "is empty; send at least one item")
        if len(listed) > limit:
            self.wrong(field, f"has {len(listed)} entries; the most is {limit}")
            return ()
        normal = []
        for n, value in enumerate(listed):
            with self.catching():
                normal.append(normalise_item_id(value, self.path(field if limit == 1 else f"{field}[{n}]")))
        return tuple(normal)

    def page_size(self, value: int) -> int:
        if value < 0:
            self.wrong("page_size", f"is {value}; send 0 for the default, or 1 to {MAX_PAGE_SIZE}")
        return min(max(value, 0), MAX_PAGE_SIZE)

    def filter(self, text: str) -> str:
        if len(text) > MAX_CHARACTERS:
            problem = f"has {len(text)} characters; the most is {MAX_CHARACTERS}."
            path = self.path("filter")
            violation = FieldViolation(path, problem, "INVALID_FILTER")
            self.caught(InvalidInput("INVALID_FILTER", f"{path} {problem}", violations=[violation]))
            return ""
        return text if text.strip() else ""

    def variant(self, value: str) -> str:
        if len(value.encode()) > MAX_VARIANT_BYTES:
            self.wrong(
                "variant", f"has {len(value.encode())} bytes in UTF-8; the most is {MAX_VARIANT_BYTES}"
            )
        return value

    def known_enum(self, field: str, request: Any) -> None:
        value = getattr(request, field)
        if value not in _ENUM_VALUES[field]:
            self.wrong(field, f"{value} is not a value of its enum")

    def window(self, request: pb.TrendingRequest) -> float:
        if not request.HasField("window"):
            return DEFAULT_WINDOW_SECONDS
        seconds = request.window.seconds + request.window.nanos * 1e-9
        if not MIN_WINDOW_SECONDS <= seconds <= MAX_WINDOW_SECONDS:
            self.wrong("window", f"is {seconds:g} s; send {MIN_WINDOW_SECONDS} to {MAX_WINDOW_SECONDS} s")
        return seconds

    def time(self, field: str, value: Timestamp) -> float | None:
        # The range that RFC 3339 can write.
        if not -62135596800 <= value.seconds <= 253402300799 or not 0 <= value.nanos < 1_000_000_000:
            self.wrong(field, "is no time of the years 1 to 9999")
            return None
        return value.seconds + value.nanos * 1e-9


class _Catching:
    """Takes an InvalidInput raised inside into the checker."""

    def __init__(self, checker: Checker) -> None:
        self._checker = checker

    def __enter__(self) -> None:
        return None

    def __exit__(self, _type: object, error: object, _traceback: object) -> bool:
        if isinstance(error, InvalidInput):
            self._checker.caught(error)
            return True
        return False


def _fingerprint(query: Query) -> bytes:
    """Returns 16 bytes by which a page token knows the request that it continues: all but what may differ."""
    same = (
        query.kind.value,
        query.user_key,
        query.placement,
        query.serving_config,
        query.item_ids,
        query.filter_text,
        query.fill_up,
        query.context_events,
        query.cart_item_ids,
        query.exclude_item_ids,
        query.seed,
        query.with_records,
        query.context_item_id,
        query.variant,
        query.window_seconds,
    )
    return hashlib.blake2b(repr(same).encode("utf-8", "surrogatepass"), digest_size=16).digest()
