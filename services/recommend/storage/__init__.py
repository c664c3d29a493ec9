"""What recommend reads from disk: models of the registry, and the configuration beside it."""

from __future__ import annotations

from services.recommend.storage.documents import DocumentDirectory
from services.recommend.storage.model_pool import ModelPool
from services.recommend.storage.models import BundleModel, ModelWatcher

__all__ = ["BundleModel", "DocumentDirectory", "ModelPool", "ModelWatcher"]
