"""Cron expressions."""

from __future__ import annotations

from datetime import UTC, datetime


def next_run_at(cron: str, after: datetime) -> datetime:
    """Returns the first moment of five cron fields (UTC) after another.

    Raises:
        ValueError: the expression is malformed, or no such day exists.
    """
    # Imported here: a server without schedules needs none of it.
    from cronsim import CronSim, CronSimError

    if len(cron.split()) != 5:
        raise ValueError(f"{cron!r} has {len(cron.split())} fields")
    try:
        return next(CronSim(cron, after.astimezone(UTC)))
    except CronSimError as error:
        raise ValueError(str(error) or f"{cron!r} is no cron expression") from error
    except StopIteration as error:
        raise ValueError(f"{cron!r} never comes") from error
