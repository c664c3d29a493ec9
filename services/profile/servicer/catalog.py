"""CatalogService: convert, call, convert."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import grpc
from shopkeeper.profile.v1 import (
    catalog_service_pb2 as pb,
)
from shopkeeper.profile.v1 import (
    catalog_service_pb2_grpc,
    item_import_pb2,
    item_pb2,
    item_portrait_pb2,
)

from services.profile.converters import item_imports as imports
from services.profile.converters import items as converters
from services.profile.converters.item_portraits import item_portrait
from services.profile.converters.profiles import resume_watermark
from services.profile.use_cases.catalogue import Catalogue
from services.profile.use_cases.item_imports import ManageItemImports
from services.profile.use_cases.item_portraits import ItemPortraits
from shared.deadline import time_remaining_seconds
from shared.identity import normalise_item_id
from shared.tokens import TokenSigner

# Where the caller sets no deadline.
DEFAULT_PATIENCE_SECONDS = 5.0
# An answer needs a moment to travel, too.
ANSWER_SECONDS = 0.01


class CatalogServicer(catalog_service_pb2_grpc.CatalogServiceServicer):
    """Serves the catalogue.

    Args:
        clock_us: microseconds since 1970; the time of writes that bring none.
        stopped: set when streams must end.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        portraits: ItemPortraits,
        manage_imports: ManageItemImports,
        signer: TokenSigner,
        clock_us: Callable[[], int],
        stopped: threading.Event,
    ) -> None:
        self._catalogue = catalogue
        self._portraits = portraits
        self._imports = manage_imports
        self._stopped = stopped
        self._signer = signer
        self._clock_us = clock_us

    def UpsertItems(
        self, request: pb.UpsertItemsRequest, context: grpc.ServicerContext
    ) -> pb.UpsertItemsResponse:
        """See the contract."""
        rows = converters.WriteConverter(self._clock_us())
        rows.upsert(request)
        return pb.UpsertItemsResponse(results=rows.results(self._catalogue.write(rows.writes)))

    def PatchItems(
        self, request: pb.PatchItemsRequest, context: grpc.ServicerContext
    ) -> pb.PatchItemsResponse:
        """See the contract."""
        rows = converters.WriteConverter(self._clock_us())
        rows.patch(request)
        return pb.PatchItemsResponse(results=rows.results(self._catalogue.write(rows.writes)))

    def SetInventory(
        self, request: pb.SetInventoryRequest, context: grpc.ServicerContext
    ) -> pb.SetInventoryResponse:
        """See the contract."""
        rows = converters.WriteConverter(self._clock_us())
        rows.inventory(request)
        return pb.SetInventoryResponse(results=rows.results(self._catalogue.write(rows.writes)))

    def DeleteItems(
        self, request: pb.DeleteItemsRequest, context: grpc.ServicerContext
    ) -> pb.DeleteItemsResponse:
        """See the contract."""
        rows = converters.WriteConverter(self._clock_us())
        rows.delete(request)
        return pb.DeleteItemsResponse(results=rows.results(self._catalogue.write(rows.writes)))

    def GetItem(self, request: pb.GetItemRequest, context: grpc.ServicerContext) -> item_pb2.Item:
        """See the contract."""
        item_id = normalise_item_id(request.item_id, "item_id")
        return converters.item_message(self._catalogue.get(item_id), with_image_bytes=True)

    def ListItems(self, request: pb.ListItemsRequest, context: grpc.ServicerContext) -> pb.ListItemsResponse:
        """See the contract."""
        item_filter, after, size = converters.list_arguments(request, self._signer)
        items, more = self._catalogue.page(item_filter, after, size)
        response = pb.ListItemsResponse(items=[converters.item_message(item) for item in items])
        if more:
            response.next_page_token = converters.next_page_token(request, items[-1].item_id, self._signer)
        return response

    def WatchItems(
        self, request: pb.WatchItemsRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchItemsResponse]:
        """See the contract."""
        resume = resume_watermark(request.resume_token, "resume_token")
        for message in self._catalogue.watch(resume, context.is_active, with_vectors=request.with_vectors):
            yield converters.items_message(message)

    def GetItemPortrait(
        self, request: pb.GetItemPortraitRequest, context: grpc.ServicerContext
    ) -> item_portrait_pb2.ItemPortrait:
        """See the contract."""
        item_id = normalise_item_id(request.item_id, "item_id")
        patience = time_remaining_seconds(context, DEFAULT_PATIENCE_SECONDS) - ANSWER_SECONDS
        return item_portrait(self._portraits.portrait(item_id, max(0.0, patience)))

    def ImportItems(
        self, request: pb.ImportItemsRequest, context: grpc.ServicerContext
    ) -> item_import_pb2.ItemImport:
        """See the contract."""
        return imports.import_message(
            self._imports.begin(*imports.from_import_items(request, self._clock_us()))
        )

    def GetItemImport(
        self, request: pb.GetItemImportRequest, context: grpc.ServicerContext
    ) -> item_import_pb2.ItemImport:
        """See the contract."""
        return imports.import_message(self._imports.get(request.import_id))

    def ListItemImports(
        self, request: pb.ListItemImportsRequest, context: grpc.ServicerContext
    ) -> pb.ListItemImportsResponse:
        """See the contract."""
        after, size = imports.page_arguments(request, self._signer)
        return imports.page_message(self._imports.page(after, size + 1), size, self._signer)

    def WatchItemImport(
        self, request: pb.WatchItemImportRequest, context: grpc.ServicerContext
    ) -> Iterator[item_import_pb2.ItemImport]:
        """See the contract."""
        for one in self._imports.watch(request.import_id, self._stopped, context.is_active):
            yield imports.import_message(one)

    def CancelItemImport(
        self, request: pb.CancelItemImportRequest, context: grpc.ServicerContext
    ) -> item_import_pb2.ItemImport:
        """See the contract."""
        return imports.import_message(self._imports.cancel(request.import_id))
