"""Runs and leases in Postgres, versions in the registry directory."""

from services.trainer.storage.lease import PublishingLease
from services.trainer.storage.models import DirectoryRegistry
from services.trainer.storage.overview import PostgresRunOverview
from services.trainer.storage.runs import PostgresRunStore
from services.trainer.storage.schedules import PostgresScheduleStore

__all__ = [
    "DirectoryRegistry",
    "PostgresRunOverview",
    "PostgresRunStore",
    "PostgresScheduleStore",
    "PublishingLease",
]
