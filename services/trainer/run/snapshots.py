"""Brings the day files up to the log: `python -m services.trainer.run.snapshots`. A process, for its memory.

Runs do so by themselves; between runs this takes out who was erased or withdrew consent.
"""

from __future__ import annotations

from services.trainer.pipeline.log_reader import LOG_ERRORS
from services.trainer.pipeline.log_snapshot import damaged_days, refresh
from services.trainer.pipeline.snapshot_files import SnapshotDirectory
from services.trainer.settings import TrainerSettings, snapshots_of
from shared.database import Database
from shared.settings import load_settings
from shared.telemetry import Telemetry


def main() -> int:
    settings = load_settings(TrainerSettings)
    logger = Telemetry("trainer-snapshots", settings).logger
    if settings.database_url is None:
        logger.error("started by the trainer, which names the database")
        return 2
    directory = SnapshotDirectory(snapshots_of(settings.home), settings.snapshot_retention_days)
    database = Database(settings.database_url, schema="trainer", pool_size=1)
    try:
        with directory.locked():
            current = directory.current()
            damaged = damaged_days(directory, current) if current is not None else []
            done = refresh(database.conninfo, directory, damaged)
    except LOG_ERRORS as error:
        logger.error("day files were not brought up to the log", error=str(error))
        return 1
    finally:
        database.close()
    logger.info(
        "day files are up to the log",
        events=done.read,
        people=done.people,
        days_read_again=len(done.read_again),
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
