"""Locks of work that one replica does for all; one family with the locks of the log, see partitions.py."""

from __future__ import annotations

from shared.exclusive_worker import ExclusiveWorker

BOTS_LOCK = 0x46424C42
EXPERIMENTS_LOCK = 0x46424C45
IMPORTS_LOCK = 0x46424C49
ROTATION_LOCK = 0x46424C52
RETENTION_LOCK = 0x46424C54
UNKNOWN_ITEMS_LOCK = 0x46424C55

__all__ = [
    "BOTS_LOCK",
    "EXPERIMENTS_LOCK",
    "IMPORTS_LOCK",
    "RETENTION_LOCK",
    "ROTATION_LOCK",
    "UNKNOWN_ITEMS_LOCK",
    "ExclusiveWorker",
]
