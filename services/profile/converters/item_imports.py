"""Imports of items: requests to jobs, and what is told of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import BadRequest
from shopkeeper.profile.v1 import catalog_service_pb2, item_import_pb2

from services.profile.converters.item_files import check_columns
from services.profile.converters.profiles import invalid, timestamp
from services.profile.domain.item_imports import ItemImport
from services.profile.domain.items import MAX_CLOCK_SKEW_US
from shared.tokens import TokenSigner

MAX_URI, MAX_REQUEST_ID = 2048, 64
DEFAULT_PAGE, MAX_PAGE = 100, 1000
_PAGE = "item-imports-page"


def from_import_items(request: catalog_service_pb2.ImportItemsRequest, now_us: int) -> tuple[bytes, str, int]:
    """Returns the source, encoded, the caller's request id, and the time of the writes.

    Raises:
        InvalidInput: names the field that is wrong.
    """
    request_id_of(request.request_id)
    if not 1 <= len(request.source_uri) <= MAX_URI or not request.source_uri.isprintable():
        raise invalid("source_uri", f"must be 1 to {MAX_URI} printable characters.")
    if request.format not in catalog_service_pb2.ItemFileFormat.values():
        raise invalid("format", "is no format of this contract.")
    if request.currency_code and not re.fullmatch(r"[A-Z]{3}", request.currency_code):
        raise invalid("currency_code", "must be three capital letters (ISO 4217), such as EUR.")
    check_columns(request)
    write_time_us = now_us
    if request.HasField("write_time"):
        write_time_us = _micros(request.write_time)
        if not 0 < write_time_us <= now_us + MAX_CLOCK_SKEW_US:
            raise invalid("write_time", "must be after 1970, and at most 5 minutes in the future.")
    source = catalog_service_pb2.ImportItemsRequest()
    source.CopyFrom(request)
    source.ClearField("request_id")
    source.ClearField("write_time")
    return source.SerializeToString(deterministic=True), request.request_id, write_time_us


def request_id_of(request_id: str) -> str:
    """Returns the id of a call; raises InvalidInput."""
    if len(request_id) > MAX_REQUEST_ID or "\x00" in request_id:
        raise invalid("request_id", f"must have at most {MAX_REQUEST_ID} characters, and no NUL.")
    return request_id


def page_arguments(
    request: catalog_service_pb2.ListItemImportsRequest, signer: TokenSigner
) -> tuple[tuple[int, str] | None, int]:
    """Returns behind which import the page begins, and its size; raises InvalidInput."""
    if request.page_size < 0:
        raise invalid("page_size", f"is {request.page_size}; send 0 for {DEFAULT_PAGE}, or 1 to {MAX_PAGE}.")
    size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
    if not request.page_token:
        return None, size
    created_us, import_id = json.loads(signer.verify(_PAGE, request.page_token, "page_token"))
    return (created_us, import_id), size


def page_message(
    imports: Sequence[ItemImport], size: int, signer: TokenSigner
) -> catalog_service_pb2.ListItemImportsResponse:
    """Returns a page; `imports` holds one more than `size` where another page follows."""
    token = ""
    if len(imports) > size:
        last = imports[size - 1]
        token = signer.sign(_PAGE, json.dumps([last.created_us, last.import_id]).encode())
    return catalog_service_pb2.ListItemImportsResponse(
        imports=[import_message(one) for one in imports[:size]], next_page_token=token
    )


def import_message(one: ItemImport) -> item_import_pb2.ItemImport:
    """Returns an import as the contract says it."""
    progress = one.progress
    return item_import_pb2.ItemImport(
        import_id=one.import_id,
        state=int(one.state),  # type: ignore[arg-type]
        source_uri=catalog_service_pb2.ImportItemsRequest.FromString(one.source).source_uri,
        read_row_count=progress.read_rows,
        stored_row_count=progress.stored_rows,
        superseded_row_count=progress.superseded_rows,
        rejected_row_count=progress.rejected_rows,
        rejected_rows=[
            item_import_pb2.RejectedRow(
                row_number=row.row_number,
                violations=[
                    BadRequest.FieldViolation(field=field, description=problem)
                    for field, problem in row.violations
                ],
            )
            for row in progress.rejected
        ],
        progress=progress.done,
        create_time=timestamp(one.created_us),
        end_time=timestamp(one.ended_us) if one.ended_us is not None else None,
        failure_reason=one.failure_reason,
        failure_message=one.failure_message,
    )


def _micros(time: Timestamp) -> int:
    return time.seconds * 1_000_000 + time.nanos // 1000
