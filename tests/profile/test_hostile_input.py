"""Whatever a caller sends, the answer is one of the contract."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shopkeeper.profile.v1 import (
    catalog_service_pb2,
    error_reason_pb2,
    item_pb2,
    profile_service_pb2,
)

from tests.profile.conftest import Shop

SERVICES = {
    "profiles": profile_service_pb2.DESCRIPTOR.services_by_name["ProfileService"],
    "catalog": catalog_service_pb2.DESCRIPTOR.services_by_name["CatalogService"],
}
METHODS = [(stub, method) for stub, service in SERVICES.items() for method in service.methods]
UNEXPECTED = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS}

_TEXT = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "\x00", "x" * 300, "ann", "EUR", "title", "𝔘ñ\u202e", "'; DROP TABLE items; --", "{,}"]
    ),
)
_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**41)),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(-1, 30),
}


def messages(descriptor: Descriptor, depth: int = 4) -> st.SearchStrategy[Message]:
    """Returns legal messages of a type, hostile values included."""

    @st.composite
    def build(draw: st.DrawFn) -> Message:
        message = message_factory.GetMessageClass(descriptor)()
        for field in descriptor.fields:
            if field.message_type and depth == 0:
                continue
            if not draw(st.booleans()):
                continue
            if field.message_type:
                values = messages(field.message_type, depth - 1)
            elif field.type == FieldDescriptor.TYPE_STRING:
                values = _TEXT
            elif field.type == FieldDescriptor.TYPE_BYTES:
                values = st.one_of(st.binary(max_size=20), st.just(b"k" * 16))
            else:
                values = _SCALARS[field.cpp_type]
            if field.is_repeated:
                drawn = draw(st.lists(values, max_size=3))
                getattr(message, field.name).extend(drawn)
            elif field.message_type:
                getattr(message, field.name).CopyFrom(draw(values))
            else:
                setattr(message, field.name, draw(values))
        return message

    return build()


def call(shop: Shop, stub: str, method: MethodDescriptor, request: Message) -> grpc.StatusCode:
    """Returns the outcome; of a stream, that of its first message."""
    invoke = getattr(getattr(shop, stub), method.name)
    try:
        answer = invoke(request, timeout=2.0)
        if method.server_streaming:
            next(answer)
            answer.cancel()
        return grpc.StatusCode.OK
    except grpc.RpcError as error:
        return error.code()


def check(shop: Shop, stub: str, method: MethodDescriptor) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(request=messages(method.input_type))
    def never_unexpected(request: Message) -> None:
        assert call(shop, stub, method, request) not in UNEXPECTED

    never_unexpected()


def test_random_legal_messages_never_end_in_an_unknown_or_internal_error(
    shop: Shop, subtests: pytest.Subtests
) -> None:
    for stub, method in METHODS:
        with subtests.test(method.name):
            check(shop, stub, method)
    # And the service still works.
    assert (
        shop.catalog.UpsertItems(
            catalog_service_pb2.UpsertItemsRequest(items=[item_pb2.Item(item_id="fine")])
        )
        .results[0]
        .status
    )


def test_every_reason_that_the_service_gives_is_documented() -> None:
    import re
    from pathlib import Path

    import services.profile

    # Reasons that every service shares are documented once for all.
    shared = {"DEADLINE_EXCEEDED"}
    documented = {
        name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.DESCRIPTOR.values_by_name
    }
    pattern = re.compile(
        r"(?:InvalidInput|NotFound|Aborted|FailedPrecondition|Unavailable|DeadlineExceeded|Unimplemented"
        r"|ResourceExhausted)\(\s*\"([A-Z_]+)\""
    )
    given_reasons = {
        reason
        for path in Path(services.profile.__file__).parent.rglob("*.py")
        for reason in pattern.findall(path.read_text())
    }
    assert len(given_reasons) > 5
    assert given_reasons - shared <= documented


def test_a_million_page_sizes_are_coerced(shop: Shop) -> None:
    response = shop.catalog.ListItems(catalog_service_pb2.ListItemsRequest(page_size=1_000_000))
    assert list(response.items) == []
