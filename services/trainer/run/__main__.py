"""Does one run, and says in the database how it ends."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable

import psycopg

from services.trainer.domain.runs import EXIT_INTERRUPTED, RunFailure, RunKind, RunState
from services.trainer.run.evaluation import evaluate
from services.trainer.run.heart import Heart
from services.trainer.run.training import train
from services.trainer.run.tuning import tune
from services.trainer.run.work import Work
from services.trainer.settings import TrainerSettings
from services.trainer.storage import PostgresRunStore
from shared.database import Database
from shared.errors import Cancelled, ShopkeeperError
from shared.settings import load_settings
from shared.telemetry import Telemetry

_NICENESS = 5
_WORK: dict[RunKind, Callable[[Work], None]] = {
    RunKind.TRAINING: train,
    RunKind.EVALUATION: evaluate,
    RunKind.TUNING: tune,
}


def failure_of(error: BaseException) -> RunFailure:
    """Returns what to tell of a run that failed."""
    if isinstance(error, ShopkeeperError):
        known = "LOG_UNAVAILABLE" if error.reason == "DATABASE_UNAVAILABLE" else error.reason
        return RunFailure(known, error.message)
    if isinstance(error, MemoryError):
        return RunFailure(
            "OUT_OF_MEMORY", "The machine has no memory left. Narrow the window, or choose a smaller size."
        )
    if isinstance(error, OSError):
        why = error.strerror or type(error).__name__
        return RunFailure(
            "REGISTRY_UNWRITABLE",
            f"The registry could not be written: {why}. It is as it was; free space, then retry.",
        )
    if isinstance(error, psycopg.Error):
        return RunFailure("LOG_UNAVAILABLE", "The database was lost during the run; start it again.")
    return RunFailure(
        "INTERNAL", f"A fault of the trainer ({type(error).__name__}); the run's log has the details."
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.trainer.run", description=__doc__)
    parser.add_argument("--run-id", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    arguments = parser.parse_args()
    # Serving goes first where both share a machine.
    os.nice(_NICENESS)
    settings = load_settings(TrainerSettings)
    telemetry = Telemetry("trainer-run", settings)
    logger = telemetry.logger
    if settings.database_url is None:
        logger.error("a run is started by the trainer, which names the database")
        return 2
    database = Database(settings.database_url, schema="trainer", pool_size=3)
    store = PostgresRunStore(database)
    run = store.get(arguments.run_id)
    if run is None or run.attempt != arguments.attempt or run.state.has_ended:
        logger.error("this attempt is no longer the run's", run_id=arguments.run_id)
        return 2
    limit = run.config.max_memory_bytes or settings.run_memory_bytes
    heart = Heart(store, run.run_id, run.attempt, limit)
    signal.signal(signal.SIGTERM, lambda *_: heart.interrupted.set())
    try:
        _WORK[run.task.kind](Work(run, settings, database, store, heart, logger))
        return 0
    except Cancelled:
        # Told by a signal, the reason is in the database: a caller, or the trainer's own end.
        if heart.cancelled.is_set() or store.beat(run.run_id, run.attempt) == RunState.CANCELLING:
            store.end(run.run_id, run.attempt, RunState.CANCELLED)
            return 0
        return EXIT_INTERRUPTED
    except Exception as error:
        logger.error("run failed", run_id=run.run_id, exc_info=error)
        store.end(run.run_id, run.attempt, RunState.FAILED, failure_of(error))
        return 1
    finally:
        heart.end()
        database.close()


if __name__ == "__main__":
    raise SystemExit(main())
