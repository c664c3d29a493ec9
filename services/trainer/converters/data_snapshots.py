"""What a run read, by name."""

from __future__ import annotations

import re

from shopkeeper.trainer.v1 import data_snapshot_pb2

from services.trainer.converters.checks import Violations
from services.trainer.domain.runs import DataSnapshot

_DIGEST = re.compile(r"[0-9a-f]{64}")


def snapshot_from_proto(
    message: data_snapshot_pb2.DataSnapshot, violations: Violations, path: str
) -> DataSnapshot:
    """Returns what is to be read again; notes what is wrong with it."""
    violations.check(
        _DIGEST.fullmatch(message.snapshot_set) is not None,
        f"{path}.snapshot_set",
        "must be 64 hex digits, as TrainingRun.data_snapshot has them.",
    )
    violations.check(
        not message.catalogue or _DIGEST.fullmatch(message.catalogue) is not None,
        f"{path}.catalogue",
        "must be 64 hex digits, as TrainingRun.data_snapshot has them, or empty for the catalogue as it is.",
    )
    return DataSnapshot(message.snapshot_set, message.catalogue)


def snapshot_to_proto(snapshot: DataSnapshot) -> data_snapshot_pb2.DataSnapshot:
    """Returns what was read, or is to be, as the contract shows it."""
    return data_snapshot_pb2.DataSnapshot(
        snapshot_set=snapshot.snapshot_set,
        catalogue=snapshot.catalogue,
        watermark=snapshot.watermark.encode(),
    )
