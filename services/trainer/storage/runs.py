"""Runs and their journals in the schema `trainer`."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from services.trainer.domain.runs import (
    DataSnapshot,
    Progress,
    RunFailure,
    RunState,
    Task,
    TrainingConfig,
    TrainingRun,
    Trial,
)
from shared.database import Database, trusted_sql
from shared.errors import AlreadyExists, ResourceExhausted

_SELECT = """
SELECT r.*, p.sequence_number AS p_sequence_number, p.created_at AS p_created_at, p.stage AS p_stage,
       p.message AS p_message, p.step AS p_step, p.epoch AS p_epoch, p.max_epochs AS p_max_epochs,
       p.loss AS p_loss, p.metrics AS p_metrics, p.remaining_seconds AS p_remaining_seconds,
       p.peak_resident_bytes AS p_peak_resident_bytes
FROM training_runs AS r
LEFT JOIN LATERAL (
    SELECT * FROM run_progress WHERE run_id = r.run_id ORDER BY sequence_number DESC LIMIT 1
) AS p ON true
"""


class PostgresRunStore:
    """Runs and journals in the schema `trainer`; implements `ports.RunStore` and what the supervisor needs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # ---- ports.RunStore

    def create(
        self,
        model: str,
        config: TrainingConfig,
        task: Task,
        *,
        request_id: str,
        max_queued: int,
        schedule_id: str = "",
    ) -> TrainingRun:
        """See `ports.RunStore.create`."""
        fields, task_fields = config.to_json(), task.to_json()
        asked = [model, fields, task.kind, task_fields]
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()
        run_id = f"run-{uuid.uuid4().hex}"
        with self._database.connect() as connection:
            waiting = connection.execute(
                "SELECT count(*) FROM training_runs WHERE state = 'QUEUED'"
            ).fetchone()
            known = self._known_request(connection, request_id) if request_id else None
            if known is None and waiting is not None and waiting[0] >= max_queued:
                raise ResourceExhausted(
                    "TOO_MANY_RUNS",
                    f"{waiting[0]} runs wait already; cancel some, or try again when they are done.",
                    {"queued": str(waiting[0]), "limit": str(max_queued)},
                    retry_after_seconds=60.0,
                )
            inserted = (
                known is None
                and connection.execute(
                    "INSERT INTO training_runs (run_id, model, kind, state, config, task, request_id, request_digest, "
                    "schedule_id) VALUES (%s, %s, %s, 'QUEUED', %s, %s, %s, %s, %s) "
                    "ON CONFLICT (request_id) DO NOTHING RETURNING run_id",
                    (
                        run_id,
                        model,
                        str(task.kind),
                        Jsonb(fields),
                        Jsonb(task_fields),
                        request_id or None,
                        digest,
                        schedule_id,
                    ),
                ).fetchone()
            )
            if not inserted:
                # Also when another call with this id was faster.
                known = known or self._known_request(connection, request_id)
                if known is None or bytes(known[1]) != digest:
                    raise AlreadyExists(
                        "REQUEST_ID_REUSED",
                        "This request_id belongs to another request; give each request an id of its own.",
                        {"requestId": request_id, "runId": known[0] if known else ""},
                    )
                run_id = known[0]
        run = self.get(run_id)
        if run is None:
            raise AssertionError("a committed run can be read")
        return run

    def get(self, run_id: str) -> TrainingRun | None:
        """See `ports.RunStore.get`."""
        found = self._query(_SELECT + "WHERE r.run_id = %s", (run_id,))
        return found[0] if found else None

    def list(
        self,
        *,
        model: str,
        states: Sequence[RunState],
        limit: int,
        before: tuple[datetime, str] | None,
    ) -> Sequence[TrainingRun]:
        """See `ports.RunStore.list`."""
        created_at, run_id = before or (None, None)
        return self._query(
            _SELECT + "WHERE (%(model)s = '' OR r.model = %(model)s) "
            "AND (%(states)s::text[] = '{}' OR r.state = ANY(%(states)s)) "
            "AND (%(created)s::timestamptz IS NULL OR (r.created_at, r.run_id) < (%(created)s, %(run)s)) "
            "ORDER BY r.created_at DESC, r.run_id DESC LIMIT %(limit)s",
            {
                "model": model,
                "states": [str(state) for state in states],
                "created": created_at,
                "run": run_id,
                "limit": limit,
            },
        )

    def request_cancel(self, run_id: str, comment: str) -> TrainingRun | None:
        """See `ports.RunStore.request_cancel`."""
        with self._database.connect() as connection:
            connection.execute(
                "UPDATE training_runs SET cancel_comment = %s, "
                "state = CASE state WHEN 'QUEUED' THEN 'CANCELLED' ELSE 'CANCELLING' END, "
                "ended_at = CASE state WHEN 'QUEUED' THEN clock_timestamp() END "
                "WHERE run_id = %s AND state IN ('QUEUED', 'RUNNING')",
                (comment, run_id),
            )
        return self.get(run_id)

    def progress_after(self, run_id: str, sequence_number: int, limit: int) -> Sequence[Progress]:
        """See `ports.RunStore.progress_after`."""
        with self._database.connect() as connection, connection.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(
                "SELECT * FROM run_progress WHERE run_id = %s AND sequence_number > %s "
                "ORDER BY sequence_number LIMIT %s",
                (run_id, sequence_number, limit),
            ).fetchall()
        return [_progress(row, "") for row in rows]

    # ---- for the supervisor

    def claim_next(self) -> TrainingRun | None:
        """Marks the oldest queued run, of a model without an active one, as running; returns it, or None."""
        try:
            with self._database.connect() as connection:
                row = connection.execute(
                    "UPDATE training_runs SET state = 'RUNNING', stage = 'STARTING', attempt = attempt + 1, "
                    "started_at = clock_timestamp(), heartbeat_at = clock_timestamp() "
                    "WHERE run_id = (SELECT q.run_id FROM training_runs AS q WHERE q.state = 'QUEUED' "
                    "AND NOT EXISTS (SELECT FROM training_runs AS a WHERE a.model = q.model "
                    "AND a.state IN ('RUNNING', 'CANCELLING')) "
                    "ORDER BY q.created_at LIMIT 1 FOR UPDATE SKIP LOCKED) AND state = 'QUEUED' RETURNING run_id"
                ).fetchone()
        except psycopg.errors.UniqueViolation:
            # Another trainer claimed a run of the same model in this moment.
            return None
        return self.get(row[0]) if row else None

    def active(self) -> Sequence[TrainingRun]:
        """Returns the runs that are RUNNING or CANCELLING."""
        return self._query(_SELECT + "WHERE r.state IN ('RUNNING', 'CANCELLING')", ())

    def silent(self, silence_seconds: float) -> Sequence[TrainingRun]:
        """Returns active runs whose process has not been heard of for so long."""
        return self._query(
            _SELECT + "WHERE r.state IN ('RUNNING', 'CANCELLING') "
            "AND r.heartbeat_at < clock_timestamp() - make_interval(secs => %s)",
            (silence_seconds,),
        )

    def end(
        self,
        run_id: str,
        attempt: int,
        state: RunState,
        failure: RunFailure | None = None,
    ) -> bool:
        """Ends a run that is still active in this attempt; returns whether it was."""
        with self._database.connect() as connection:
            ended = connection.execute(
                "UPDATE training_runs SET state = %s, failure_reason = %s, failure_message = %s, "
                "ended_at = clock_timestamp() "
                "WHERE run_id = %s AND attempt = %s AND state IN ('RUNNING', 'CANCELLING')",
                (
                    str(state),
                    failure.reason if failure else "",
                    failure.message if failure else "",
                    run_id,
                    attempt,
                ),
            )
            return ended.rowcount == 1

    def adopt(self, run_id: str, attempt: int, version: str, gate: Mapping[str, Any], promoted: bool) -> None:
        """Marks a run as succeeded whose process published, and died before it could say so."""
        with self._database.connect() as connection:
            connection.execute(
                "UPDATE training_runs SET state = 'SUCCEEDED', version = %s, gate = %s, promoted = %s, "
                "ended_at = clock_timestamp() "
                "WHERE run_id = %s AND attempt = %s AND state IN ('RUNNING', 'CANCELLING')",
                (version, Jsonb(dict(gate)), promoted, run_id, attempt),
            )

    def requeue(self, run_id: str, attempt: int) -> bool:
        """Puts a run whose process was interrupted back into the queue; returns whether it was running."""
        with self._database.connect() as connection:
            moved = connection.execute(
                "UPDATE training_runs SET state = 'QUEUED', stage = 'UNSPECIFIED', started_at = NULL, "
                "heartbeat_at = NULL WHERE run_id = %s AND attempt = %s AND state = 'RUNNING'",
                (run_id, attempt),
            )
            return moved.rowcount == 1

    # ---- for the run's own process

    def beat(self, run_id: str, attempt: int) -> RunState | None:
        """Renews the heartbeat; returns the state, or None where this attempt is no longer the run's."""
        with self._database.connect() as connection:
            row = connection.execute(
                "UPDATE training_runs SET heartbeat_at = clock_timestamp() "
                "WHERE run_id = %s AND attempt = %s AND state IN ('RUNNING', 'CANCELLING') RETURNING state",
                (run_id, attempt),
            ).fetchone()
        return RunState(row[0]) if row else None

    def read_watermark(self, run_id: str) -> str:
        """Returns the `pg_snapshot` as of which the run reads the log; empty before its first reading."""
        with self._database.connect() as connection:
            row = connection.execute(
                "SELECT read_watermark FROM training_runs WHERE run_id = %s", (run_id,)
            ).fetchone()
        return str(row[0]) if row else ""

    def set_read_watermark(self, run_id: str, watermark: str) -> None:
        """Notes as of when the run reads the log."""
        with self._database.connect() as connection:
            connection.execute(
                "UPDATE training_runs SET read_watermark = %s WHERE run_id = %s", (watermark, run_id)
            )

    def set_data_snapshot(self, run_id: str, snapshot: DataSnapshot) -> None:
        """Notes what the run read."""
        with self._database.connect() as connection:
            connection.execute(
                "UPDATE training_runs SET data_snapshot = %s WHERE run_id = %s",
                (Jsonb(asdict(snapshot)), run_id),
            )

    def finish_evaluation(self, run_id: str, attempt: int, measures: Mapping[str, Any]) -> bool:
        """Ends an evaluation that is still running in this attempt with what it found; returns whether it was."""
        with self._database.connect() as connection:
            ended = connection.execute(
                "UPDATE training_runs SET state = 'SUCCEEDED', evaluation = %s, ended_at = clock_timestamp() "
                "WHERE run_id = %s AND attempt = %s AND state = 'RUNNING'",
                (Jsonb(dict(measures)), run_id, attempt),
            )
            return ended.rowcount == 1

    def add_trial(self, run_id: str, attempt: int, trial: Trial) -> None:
        """Keeps a trial of a tuning run, while this attempt is the run's."""
        with self._database.connect() as connection:
            connection.execute(
                "UPDATE training_runs SET trials = trials || %s WHERE run_id = %s AND attempt = %s",
                (Jsonb([asdict(trial)]), run_id, attempt),
            )

    def finish(self, run_id: str, attempt: int) -> bool:
        """Ends a run that published nothing and needed to; returns whether it was still running in this attempt."""
        return self.end(run_id, attempt, RunState.SUCCEEDED)

    def append_progress(self, run_id: str, stage: str, message: str, **fields: Any) -> int:
        """Adds an entry to a run's journal and sets the run's stage; returns its number."""
        with self._database.connect() as connection:
            return append_progress_entry(connection, run_id, stage, message, fields)

    @staticmethod
    def _known_request(connection: psycopg.Connection[Any], request_id: str) -> tuple[str, bytes] | None:
        return connection.execute(
            "SELECT run_id, request_digest FROM training_runs WHERE request_id = %s", (request_id,)
        ).fetchone()

    def _query(self, text: str, arguments: Mapping[str, Any] | Sequence[Any]) -> Sequence[TrainingRun]:
        with self._database.connect() as connection, connection.cursor(row_factory=dict_row) as cursor:
            return [_run(row) for row in cursor.execute(trusted_sql(text), arguments).fetchall()]


def append_progress_entry(
    connection: psycopg.Connection[Any], run_id: str, stage: str, message: str, fields: Mapping[str, Any]
) -> int:
    # The row lock orders writers, so that numbers have no gaps.
    connection.execute("UPDATE training_runs SET stage = %s WHERE run_id = %s", (stage, run_id))
    row = connection.execute(
        "INSERT INTO run_progress (run_id, sequence_number, stage, message, step, epoch, max_epochs, loss, "
        "metrics, remaining_seconds, peak_resident_bytes) "
        "SELECT %s, coalesce(max(sequence_number), 0) + 1, %s, %s, %s, %s, %s, %s, %s, %s, %s "
        "FROM run_progress WHERE run_id = %s RETURNING sequence_number",
        (
            run_id,
            stage,
            message,
            int(fields.get("step", 0)),
            int(fields.get("epoch", 0)),
            int(fields.get("max_epochs", 0)),
            fields.get("loss"),
            Jsonb(dict(fields.get("metrics", {}))),
            fields.get("remaining_seconds"),
            int(fields.get("peak_resident_bytes", 0)),
            run_id,
        ),
    ).fetchone()
    return int(row[0]) if row else 0


def _run(row: Mapping[str, Any]) -> TrainingRun:
    reason = row["failure_reason"]
    return TrainingRun(
        run_id=row["run_id"],
        model=row["model"],
        state=RunState(row["state"]),
        stage=row["stage"],
        config=TrainingConfig.from_json(row["config"]),
        created_at=row["created_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        latest_progress=_progress(row, "p_") if row["p_sequence_number"] else None,
        version=row["version"],
        gate=row["gate"],
        failure=RunFailure(reason, row["failure_message"]) if reason else None,
        cancel_comment=row["cancel_comment"],
        promoted=row["promoted"],
        attempt=row["attempt"],
        task=Task.from_json(row["kind"], row["task"]),
        evaluation=row["evaluation"],
        trials=tuple(
            sorted((Trial(**trial) for trial in row["trials"]), key=lambda t: -t.validation_ndcg_at_10)
        ),
        schedule_id=row["schedule_id"],
        data_snapshot=DataSnapshot(**row["data_snapshot"]) if row["data_snapshot"] else None,
    )


def _progress(row: Mapping[str, Any], prefix: str) -> Progress:
    return Progress(**{name: row[prefix + name] for name in Progress.__dataclass_fields__})
