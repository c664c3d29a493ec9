"""The catalogue, over gRPC."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import grpc
import numpy as np
from shopkeeper.profile.v1 import catalog_service_pb2, catalog_service_pb2_grpc, item_pb2

from shared.channel import open_channel
from shared.tls import TlsDirectory

_SERVICE = "shopkeeper.profile.v1.CatalogService"
_PAGE_SIZE = 1000
_BANDS = 10
_WORD = re.compile(r"[^\W\d_]{3,}")


class CatalogueClient:
    """Reads what `profile` knows of items.

    Args:
        address: host:port of the profile service.
        timeout_seconds: for each page.
        tls: own certificate; None for plain text on this machine.
    """

    def __init__(self, address: str, timeout_seconds: float, tls: TlsDirectory | None = None) -> None:
        self._channel = open_channel(address, service=_SERVICE, tls=tls)
        self._stub = catalog_service_pb2_grpc.CatalogServiceStub(self._channel)
        self._timeout_seconds = timeout_seconds

    def attributes(self) -> tuple[dict[str, list[str]], str]:
        """Returns the attribute values of each item id, such as "brand:acme", and why there are none.

        A shop need not keep a catalogue here, and a model can do without: no failure is an error.
        """
        values: dict[str, list[str]] = {}
        numbers: dict[str, dict[str, float]] = {}
        try:
            for item in self._items():
                values[item.item_id] = values_of(item)
                for name, number in numbers_of(item).items():
                    numbers.setdefault(name, {})[item.item_id] = number
            for name in sorted(numbers):
                for item_id, band in bands_of(numbers[name]).items():
                    values[item_id].append(f"{name}~{band}")
            return values, ""
        except grpc.RpcError as error:
            code = error.code().name if isinstance(error, grpc.Call) else "UNKNOWN"
            return {}, f"the catalogue did not answer ({code})"

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()

    def _items(self) -> Iterator[item_pb2.Item]:
        token = ""
        while True:
            page = self._stub.ListItems(
                catalog_service_pb2.ListItemsRequest(page_size=_PAGE_SIZE, page_token=token),
                timeout=self._timeout_seconds,
            )
            yield from page.items
            token = page.next_page_token
            if not token:
                return


def values_of(item: item_pb2.Item) -> list[str]:
    """Returns an item's values: each step of its category, brand, tags, typed attributes, words of its title.

    Numbers are left out: as names they say nothing, 9.99 is not near to 10; see `bands_of`.
    """
    path = list(item.category_path)
    values = ["category:" + " > ".join(path[: depth + 1]) for depth in range(len(path))]
    if item.brand:
        values.append(f"brand:{item.brand}")
    values += [f"tag:{tag}" for tag in item.tags]
    for attribute in item.attributes:
        kind = attribute.WhichOneof("value")
        if kind == "text":
            values.append(f"{attribute.key}={attribute.text}")
        elif kind == "flag":
            values.append(f"{attribute.key}={attribute.flag}")
    if item.primary_item_id:
        values.append(f"variant-of:{item.primary_item_id}")
    values += sorted({f"word:{word}" for word in _WORD.findall(item.title.lower())})
    return values


def numbers_of(item: item_pb2.Item) -> dict[str, float]:
    """Returns an item's numbers by name: its price, in its currency, and its attributes."""
    found = {attribute.key: attribute.number for attribute in item.attributes if attribute.HasField("number")}
    if item.HasField("price_micros"):
        found[f"price:{item.currency_code}"] = item.price_micros / 1e6
    return found


def bands_of(number_of: Mapping[str, float]) -> dict[str, int]:
    """Returns which tenth of the catalogue each item is in by a number, 0 to 9; what is equal is in one.

    Tenths need no scale: prices spread over powers of ten, and shops differ. Fewer than twenty items have none.
    """
    if len(number_of) < 2 * _BANDS:
        return {}
    number_N = np.array(list(number_of.values()))
    edges = np.quantile(number_N, np.arange(1, _BANDS) / _BANDS)
    return dict(zip(number_of, np.searchsorted(edges, number_N, side="right").tolist(), strict=True))
