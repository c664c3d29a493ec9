"""No legal message ever makes the service fail in a way that the contract does not name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb

from shared.event_kinds import EventKind
from tests.recommend.shop import Shop, eventually, item
from tests.recommend.test_service import IDS, VECTORS

SERVICE = pb.DESCRIPTOR.services_by_name["RecommendService"]
UNARY = [method.name for method in SERVICE.methods if not method.server_streaming]
DOCUMENTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.ABORTED,
}


@pytest.fixture(scope="module")
def shop(keys_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    shop = Shop(keys_dir, tmp_path_factory.mktemp("any"))
    shop.publish(IDS, VECTORS, pairs={("shoe-1", "hat"): 0.9})
    shop.profile.upsert(*(item(item_id, price=1.0) for item_id in IDS))
    shop.start()
    shop.profile.record(shop.user_key("ann"), ("shoe-1", EventKind.PURCHASE), ("hat", EventKind.ITEM_VIEW))
    eventually(lambda: shop.service.profiles.state().entries == 1)  # type: ignore[union-attr]
    yield shop
    shop.close()


TEXTS = st.one_of(
    st.sampled_from(
        ["", "ann", "hat", "shoe-1", "home", "cart", "default", "popular", "similar", "price < 2"]
    ),
    st.text(max_size=12),
)
NUMBERS = st.integers(-3, 5) | st.integers(-(2**31), 2**31 - 1)
OF_TYPE: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: TEXTS,
    FieldDescriptor.TYPE_BYTES: st.binary(max_size=17) | st.binary(min_size=16, max_size=16),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_INT32: NUMBERS,
    FieldDescriptor.TYPE_INT64: NUMBERS | st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_ENUM: st.integers(0, 20) | st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_FLOAT: st.floats(width=32),
}


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor, depth: int = 3) -> Any:
    """Any message of a type that the wire can carry."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if not draw(st.booleans()):
            continue
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            if depth == 0:
                continue
            inner = messages(field.message_type, depth - 1)
            if field.is_repeated:
                getattr(message, field.name).extend(draw(st.lists(inner, max_size=3)))
            else:
                getattr(message, field.name).CopyFrom(draw(inner))
        elif field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(OF_TYPE[field.type], max_size=4)))
        else:
            setattr(message, field.name, draw(OF_TYPE[field.type]))
    return message


@pytest.mark.parametrize("method", UNARY)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_legal_request_is_answered_or_refused_with_a_documented_code(
    shop: Shop, method: str, data: st.DataObject
) -> None:
    request = data.draw(messages(SERVICE.methods_by_name[method].input_type))
    assert code_of(lambda: getattr(shop.stub, method)(request, timeout=10)) in DOCUMENTED


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()  # type: ignore[attr-defined, no-any-return]
    return grpc.StatusCode.OK
