"""Runs and leases in Postgres, versions in the registry directory."""

from services.trainer.storage.lease import PublishingLease
from services.trainer.storage.models import DirectoryRegistry
from services.trainer.storage.runs import PostgresRunStore

__all__ = ["DirectoryRegistry", "PostgresRunStore", "PublishingLease"]
