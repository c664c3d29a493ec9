"""The catalogue: protobuf to domain and back, and what makes a row valid.

Rows are judged one by one, and every problem of a row is told: the path within the request, what is wrong,
what would be right.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence

from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import BadRequest
from shopkeeper.profile.v1 import catalog_service_pb2, item_pb2

from services.profile.converters.profiles import invalid, timestamp
from services.profile.domain.items import (
    ALL_FIELDS,
    MAX_BATCH_ROWS,
    MAX_CLOCK_SKEW_US,
    Attribute,
    Field,
    Item,
    ItemFilter,
    ItemWrite,
    WriteResult,
    WriteStatus,
)
from services.profile.domain.messages import ItemsMessage
from shared.errors import FieldViolation, InvalidInput
from shared.identity import normalise_item_id
from shared.tokens import TokenSigner, pack_page, unpack_page

MAX_IMAGE_BYTES = 1 << 20
MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100
_CURRENCY = re.compile(r"[A-Z]{3}")
_LANGUAGE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*")
_IMAGE_URI = re.compile(r"(https?://|data:)[^\s]+", re.IGNORECASE)
# 0001-01-01 to 9999-12-31, as google.protobuf.Timestamp has it.
_MIN_SECONDS, _MAX_SECONDS = -62_135_596_800, 253_402_300_799
_INT64_MAX = 2**63 - 1
_FIELD_OF_PATH = {
    field.name.lower(): field for field in Field if field not in (Field.DELETED, Field.IMAGE)
} | {"image": Field.IMAGE, "image_uri": Field.IMAGE, "image_bytes": Field.IMAGE}
_PRICES = {Field.PRICE_MICROS, Field.LIST_PRICE_MICROS, Field.MARGIN_MICROS}


class _Row:
    """Collects the problems of one row."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.violations: list[FieldViolation] = []

    def refuse(self, field: str, problem: str) -> None:
        path = f"{self.path}.{field}" if field else self.path
        self.violations.append(FieldViolation(path, problem))

    def text(self, field: str, text: str, max_characters: int, min_characters: int = 0) -> str:
        if len(text) > max_characters:
            self.refuse(field, f"has {len(text)} characters; the most is {max_characters}.")
        elif len(text) < min_characters:
            self.refuse(field, "is empty.")
        elif "\x00" in text:
            self.refuse(field, "has a NUL character; remove it.")
        return text

    def item_id(self, field: str, item_id: str) -> str:
        try:
            return normalise_item_id(item_id, field)
        except InvalidInput as error:
            self.refuse(field, error.violations[0].description)
            return item_id

    def whole(self, field: str, number: int) -> int:
        if number < 0:
            self.refuse(field, f"is {number}; send 0 or more.")
        return number

    def time_us(self, field: str, time: Timestamp) -> int:
        if not _MIN_SECONDS <= time.seconds <= _MAX_SECONDS or not 0 <= time.nanos < 1_000_000_000:
            self.refuse(field, "is not a valid Timestamp: years 1 to 9999, nanos 0 to 999,999,999.")
            return 0
        return time.seconds * 1_000_000 + time.nanos // 1000

    def write_time_us(self, field: str, time: Timestamp, now_us: int) -> int:
        time_us = self.time_us(field, time)
        if time_us > now_us + MAX_CLOCK_SKEW_US:
            self.refuse(field, "is more than 5 minutes in the future; set the shop's clock.")
        elif time_us <= 0:
            self.refuse(field, "is not after 1970.")
        return time_us

    def currency(self, field: str, code: str, required_by: Sequence[str]) -> str:
        if code:
            if not _CURRENCY.fullmatch(code):
                self.refuse(field, f"is {code[:10]!r}; send three capital letters (ISO 4217), such as EUR.")
        elif required_by:
            self.refuse(
                field, f"is empty, but {required_by[0]} is set; send the price's currency, such as EUR."
            )
        return code


class WriteConverter:
    """Turns rows of a request into writes; rows that are invalid become results at once.

    Args:
        now_us: when the call arrived, microseconds since 1970.
    """

    def __init__(self, now_us: int) -> None:
        self._now_us = now_us
        self.writes: list[ItemWrite] = []
        self.rejected: dict[int, catalog_service_pb2.ItemWriteResult] = {}
        self._row_count = 0

    def upsert(self, request: catalog_service_pb2.UpsertItemsRequest) -> None:
        """Takes whole items; raises InvalidInput where the call as a whole is wrong."""
        _check_count("items", len(request.items))
        time_us = self._call_time(request, "write_time")
        for item in request.items:
            row = self._next_row("items")
            domain_item = _item(row, item, ALL_FIELDS)
            self._finish(row, domain_item, ALL_FIELDS, time_us, etag=item.etag)

    def patch(self, request: catalog_service_pb2.PatchItemsRequest) -> None:
        """Takes patches; raises InvalidInput where the call as a whole is wrong."""
        _check_count("patches", len(request.patches))
        for patch in request.patches:
            row = self._next_row("patches")
            fields = set()
            if not patch.update_mask.paths:
                row.refuse("update_mask", "is empty; name the fields to write.")
            for path in patch.update_mask.paths:
                field = _FIELD_OF_PATH.get(path)
                if field is None:
                    row.refuse("update_mask", f"names {path[:50]!r}, which is no field that can be written.")
                else:
                    fields.add(field)
            time_us = self._now_us
            if patch.HasField("write_time"):
                time_us = row.write_time_us("write_time", patch.write_time, self._now_us)
            item_row = _Row(f"{row.path}.item")
            item = _item(item_row, patch.item, frozenset(fields))
            row.violations.extend(item_row.violations)
            self._finish(
                row, item, frozenset(fields), time_us, etag=patch.item.etag, may_create=patch.allow_missing
            )

    def inventory(self, request: catalog_service_pb2.SetInventoryRequest) -> None:
        """Takes stock and prices; raises InvalidInput where the call as a whole is wrong."""
        _check_count("entries", len(request.entries))
        for entry in request.entries:
            row = self._next_row("entries")
            fields = set()
            stock = price = list_price = None
            if entry.HasField("stock_quantity"):
                fields.add(Field.STOCK_QUANTITY)
                stock = row.whole("stock_quantity", entry.stock_quantity)
            if entry.HasField("price_micros"):
                fields |= {Field.PRICE_MICROS, Field.CURRENCY_CODE}
                price = row.whole("price_micros", entry.price_micros)
            if entry.HasField("list_price_micros"):
                fields |= {Field.LIST_PRICE_MICROS, Field.CURRENCY_CODE}
                list_price = row.whole("list_price_micros", entry.list_price_micros)
            if not fields:
                row.refuse("", "sets nothing; set stock_quantity, price_micros or list_price_micros.")
            required_by = [f.name.lower() for f in sorted(fields & _PRICES)]
            currency = row.currency("currency_code", entry.currency_code, required_by)
            time_us = self._now_us
            if entry.HasField("write_time"):
                time_us = row.write_time_us("write_time", entry.write_time, self._now_us)
            item = Item(
                row.item_id("item_id", entry.item_id),
                stock_quantity=stock,
                price_micros=price,
                list_price_micros=list_price,
                currency_code=currency,
            )
            self._finish(row, item, frozenset(fields), time_us, describes=False)

    def delete(self, request: catalog_service_pb2.DeleteItemsRequest) -> None:
        """Takes ids to delete; raises InvalidInput where the call as a whole is wrong."""
        _check_count("item_ids", len(request.item_ids))
        time_us = self._call_time(request, "write_time")
        for item_id in request.item_ids:
            row = self._next_row("item_ids")
            item_row = _Row("")
            item = Item(item_row.item_id("", item_id), deleted=True)
            for violation in item_row.violations:
                row.refuse("", violation.description)
            self._finish(row, item, frozenset({Field.DELETED}), time_us, describes=False)

    def results(self, written: Iterable[WriteResult]) -> list[catalog_service_pb2.ItemWriteResult]:
        """Returns one result for each row of the request, in its order."""
        results = dict(self.rejected)
        for result in written:
            results[result.row] = catalog_service_pb2.ItemWriteResult(
                item_id=result.item_id,
                status=int(result.status),  # type: ignore[arg-type]
                etag=etag(result.revision),
            )
        return [results[row] for row in range(self._row_count)]

    def _next_row(self, name: str) -> _Row:
        row = _Row(f"{name}[{self._row_count}]")
        self._row_count += 1
        return row

    def _call_time(
        self,
        request: catalog_service_pb2.UpsertItemsRequest | catalog_service_pb2.DeleteItemsRequest,
        field: str,
    ) -> int:
        if not request.HasField("write_time"):
            return self._now_us
        call = _Row("request")
        time_us = call.write_time_us(field, request.write_time, self._now_us)
        if call.violations:
            raise invalid(field, call.violations[0].description)
        return time_us

    def _finish(
        self,
        row: _Row,
        item: Item,
        fields: frozenset[Field],
        time_us: int,
        *,
        etag: str = "",
        describes: bool = True,
        may_create: bool = True,
    ) -> None:
        index = self._row_count - 1
        if_revision = None
        if etag:
            try:
                if_revision = int(etag, 16) if len(etag) <= 16 else -1
            except ValueError:
                # Not one of ours, so it cannot be the current one.
                if_revision = -1
        if row.violations:
            self.rejected[index] = catalog_service_pb2.ItemWriteResult(
                item_id=item.item_id[:256],
                status=int(WriteStatus.REJECTED),  # type: ignore[arg-type]
                violations=[
                    BadRequest.FieldViolation(field=v.field, description=v.description)
                    for v in row.violations
                ],
            )
        else:
            self.writes.append(ItemWrite(index, item, fields, time_us, describes, may_create, if_revision))


def etag(revision: int) -> str:
    """Returns the etag of a revision; empty for none."""
    return f"{revision:x}" if revision else ""


def _check_count(field: str, count: int) -> None:
    if not 1 <= count <= MAX_BATCH_ROWS:
        raise invalid(field, f"has {count} rows; send 1 to {MAX_BATCH_ROWS}.")


def _item(row: _Row, item: item_pb2.Item, fields: frozenset[Field]) -> Item:
    """Returns the domain item, judging the fields that are written."""

    def micros(field: Field, *, may_be_negative: bool = False) -> int | None:
        name = field.name.lower()
        if field not in fields or not item.HasField(name):  # type: ignore[arg-type]
            return None
        number: int = getattr(item, name)
        return number if may_be_negative else row.whole(name, number)

    def time_us(field: Field) -> int | None:
        name = field.name.lower()
        if field not in fields or not item.HasField(name):  # type: ignore[arg-type]
            return None
        return row.time_us(name, getattr(item, name))

    price = micros(Field.PRICE_MICROS)
    list_price = micros(Field.LIST_PRICE_MICROS)
    margin = micros(Field.MARGIN_MICROS, may_be_negative=True)
    required_by = [
        name
        for name, value in (
            ("price_micros", price),
            ("list_price_micros", list_price),
            ("margin_micros", margin),
        )
        if value is not None
    ]
    if required_by and Field.CURRENCY_CODE not in fields:
        row.refuse("currency_code", f"is not in the mask, but {required_by[0]} is; name and set both.")
    available_from, available_until = time_us(Field.AVAILABLE_FROM), time_us(Field.AVAILABLE_UNTIL)
    if available_from is not None and available_until is not None and available_until <= available_from:
        row.refuse("available_until", "is not after available_from.")
    rating_count, rating_mean = micros(Field.RATING_COUNT), None
    if Field.RATING_MEAN in fields and item.HasField("rating_mean"):
        rating_mean = item.rating_mean
        if not 0.0 <= rating_mean <= 5.0:
            row.refuse("rating_mean", "is not in [0, 5].")
        if not rating_count and Field.RATING_COUNT in fields:
            row.refuse("rating_mean", "is set, but rating_count is not 1 or more.")
    language = item.language_code
    if language and (len(language) > 35 or not _LANGUAGE.fullmatch(language)):
        row.refuse("language_code", "is not a BCP 47 tag such as 'en' or 'zh-Hans'.")
    primary = item.primary_item_id
    return Item(
        item_id=row.item_id("item_id", item.item_id),
        title=row.text("title", item.title, 1000),
        description=row.text("description", item.description, 20_000),
        brand=row.text("brand", item.brand, 256),
        category_path=_texts(row, "category_path", item.category_path, 16, 256, distinct=False),
        attributes=_attributes(row, item),
        price_micros=price,
        list_price_micros=list_price,
        currency_code=row.currency(
            "currency_code", item.currency_code, required_by if Field.CURRENCY_CODE in fields else ()
        ),
        stock_quantity=micros(Field.STOCK_QUANTITY),
        primary_item_id=row.item_id("primary_item_id", primary) if primary else "",
        image_uri=_image_uri(row, item),
        image_bytes=_image_bytes(row, item),
        tags=_texts(row, "tags", item.tags, 100, 128, distinct=True),
        available_from_us=available_from,
        available_until_us=available_until,
        margin_micros=margin,
        language_code=language,
        rating_count=rating_count,
        rating_mean=rating_mean,
        withdrawn=item.withdrawn,
    )


def _texts(
    row: _Row, field: str, texts: Sequence[str], max_texts: int, max_characters: int, *, distinct: bool
) -> tuple[str, ...]:
    if len(texts) > max_texts:
        row.refuse(field, f"has {len(texts)} entries; the most is {max_texts}.")
        return ()
    for index, text in enumerate(texts):
        row.text(f"{field}[{index}]", text, max_characters, 1)
    if distinct and len(set(texts)) < len(texts):
        row.refuse(field, "has an entry twice.")
    return tuple(texts)


def _attributes(row: _Row, item: item_pb2.Item) -> tuple[Attribute, ...]:
    if len(item.attributes) > 100:
        row.refuse("attributes", f"has {len(item.attributes)} entries; the most is 100.")
        return ()
    attributes = []
    keys = set()
    for index, attribute in enumerate(item.attributes):
        path = f"attributes[{index}]"
        key = row.text(f"{path}.key", attribute.key, 128, 1)
        if key in keys:
            row.refuse(f"{path}.key", "occurs twice.")
        keys.add(key)
        match attribute.WhichOneof("value"):
            case "text":
                text = row.text(f"{path}.text", attribute.text, 1024)
                attributes.append(Attribute(key, text))
            case "number":
                if not math.isfinite(attribute.number):
                    row.refuse(f"{path}.number", "is not finite.")
                attributes.append(Attribute(key, attribute.number))
            case "flag":
                attributes.append(Attribute(key, attribute.flag))
            case _:
                row.refuse(path, "has no value; set text, number or flag.")
    return tuple(attributes)


def _image_uri(row: _Row, item: item_pb2.Item) -> str:
    uri = item.image_uri
    if uri and (len(uri) > 2048 or "\x00" in uri or not _IMAGE_URI.fullmatch(uri)):
        row.refuse("image_uri", "is not an http, https or data URI of at most 2,048 characters.")
    return uri


def _image_bytes(row: _Row, item: item_pb2.Item) -> bytes:
    image = item.image_bytes
    if not image:
        return b""
    if len(image) > MAX_IMAGE_BYTES:
        row.refuse("image_bytes", f"has {len(image)} bytes; the most is {MAX_IMAGE_BYTES}.")
    elif not (
        image.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))
        or (image[:4] == b"RIFF" and image[8:12] == b"WEBP")
    ):
        row.refuse("image_bytes", "is neither JPEG, PNG nor WebP.")
    return image


def item_message(item: Item, *, with_image_bytes: bool = False) -> item_pb2.Item:
    """Returns the message of an item."""
    message = item_pb2.Item(
        item_id=item.item_id,
        title=item.title,
        description=item.description,
        brand=item.brand,
        category_path=item.category_path,
        attributes=[_attribute_message(attribute) for attribute in item.attributes],
        price_micros=item.price_micros,
        list_price_micros=item.list_price_micros,
        currency_code=item.currency_code,
        stock_quantity=item.stock_quantity,
        primary_item_id=item.primary_item_id,
        tags=item.tags,
        margin_micros=item.margin_micros,
        language_code=item.language_code,
        rating_count=item.rating_count,
        rating_mean=item.rating_mean,
        withdrawn=item.withdrawn,
        placeholder=item.placeholder,
        update_time=timestamp(item.update_time_us),
        etag=etag(item.revision),
    )
    if item.available_from_us is not None:
        message.available_from.CopyFrom(timestamp(item.available_from_us))
    if item.available_until_us is not None:
        message.available_until.CopyFrom(timestamp(item.available_until_us))
    if item.image_uri:
        message.image_uri = item.image_uri
    elif with_image_bytes and item.image_bytes:
        message.image_bytes = item.image_bytes
    return message


def encode_item(item: Item) -> bytes:
    """Returns the item as watchers get it: without its picture."""
    return item_message(item).SerializeToString()


def items_message(message: ItemsMessage) -> catalog_service_pb2.WatchItemsResponse:
    """Returns a message of the stream, around records that are encoded already."""
    # A repeated field on the wire is its tag (1, length-delimited), a length and the record, again and again.
    wire = b"".join(part for record in message.upserted for part in (b"\x0a", _varint(len(record)), record))
    parts = [wire]
    # Vectors likewise (6): an id (1) and packed floats (2).
    for item_id, values in message.vectors:
        encoded_id = item_id.encode()
        vector = b"".join(
            (b"\x0a", _varint(len(encoded_id)), encoded_id, b"\x12", _varint(len(values)), values)
        )
        parts += (b"\x32", _varint(len(vector)), vector)
    response = catalog_service_pb2.WatchItemsResponse.FromString(b"".join(parts))
    response.vector_version = message.vector_version
    response.deleted_item_ids.extend(message.deleted_item_ids)
    response.snapshot_complete = message.snapshot_complete
    response.reset = message.reset
    if message.watermark is not None:
        response.watermark = message.watermark.encode()
    return response


def list_arguments(
    request: catalog_service_pb2.ListItemsRequest, signer: TokenSigner
) -> tuple[ItemFilter, str, int]:
    """Returns (filter, id after which the page begins, page size).

    Raises:
        InvalidInput: a field is malformed, or the token is of another filter.
    """
    if request.page_size < 0:
        raise invalid("page_size", f"is {request.page_size}; send 0 (for {DEFAULT_PAGE_SIZE}) or more.")
    size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
    item_filter = _filter(request.filter)
    after = ""
    if request.page_token:
        fields = unpack_page(signer.verify("page", request.page_token, "page_token"))
        if len(fields) != 3 or fields[0] != "items" or fields[1] != _digest(request.filter):
            raise InvalidInput(
                "INVALID_TOKEN",
                "page_token belongs to another list or filter; repeat the arguments of the first page.",
                {"kind": "page"},
                [FieldViolation("page_token", "belongs to another list or filter.")],
            )
        after = fields[2]
    return item_filter, after, size


def next_page_token(
    request: catalog_service_pb2.ListItemsRequest, last_item_id: str, signer: TokenSigner
) -> str:
    """Returns the token of the page behind an item."""
    return signer.sign("page", pack_page(("items", _digest(request.filter), last_item_id)))


def _filter(message: catalog_service_pb2.ItemFilter) -> ItemFilter:
    row = _Row("filter")
    item_filter = ItemFilter(
        category_path_prefix=_texts(
            row, "category_path_prefix", message.category_path_prefix, 16, 256, distinct=False
        ),
        brands=_texts(row, "brands", message.brands, 100, 256, distinct=False),
        tags=_texts(row, "tags", message.tags, 100, 128, distinct=False),
        primary_item_id=(
            row.item_id("primary_item_id", message.primary_item_id) if message.primary_item_id else ""
        ),
        in_stock_only=message.in_stock_only,
        min_price_micros=message.min_price_micros if message.HasField("min_price_micros") else None,
        max_price_micros=message.max_price_micros if message.HasField("max_price_micros") else None,
        currency_code=row.currency(
            "currency_code",
            message.currency_code,
            [name for name in ("min_price_micros", "max_price_micros") if message.HasField(name)],
        ),
        exclude_withdrawn=message.exclude_withdrawn,
        exclude_placeholders=message.exclude_placeholders,
    )
    if row.violations:
        first = row.violations[0]
        raise InvalidInput("INVALID_REQUEST", f"{first.field} {first.description}", violations=row.violations)
    return item_filter


def _digest(message: catalog_service_pb2.ItemFilter) -> str:
    return hashlib.sha256(message.SerializeToString(deterministic=True)).hexdigest()[:16]


def _attribute_message(attribute: Attribute) -> item_pb2.Attribute:
    match attribute.value:
        case bool():
            return item_pb2.Attribute(key=attribute.key, flag=attribute.value)
        case str():
            return item_pb2.Attribute(key=attribute.key, text=attribute.value)
    return item_pb2.Attribute(key=attribute.key, number=attribute.value)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
