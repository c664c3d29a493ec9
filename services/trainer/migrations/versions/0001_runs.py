"""Runs and their journals."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

UPGRADE = """
CREATE TABLE training_runs (
    run_id text PRIMARY KEY,
    model text NOT NULL,
    kind text NOT NULL DEFAULT 'TRAINING',
    state text NOT NULL
        CHECK (state IN ('QUEUED', 'RUNNING', 'CANCELLING', 'SUCCEEDED', 'FAILED', 'CANCELLED')),
    stage text NOT NULL DEFAULT 'UNSPECIFIED',
    config jsonb NOT NULL,
    request_id text UNIQUE,
    request_digest bytea,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    started_at timestamptz,
    ended_at timestamptz,
    -- The process that works on the run renews it; a run without a fresh one has no process.
    heartbeat_at timestamptz,
    -- Raised at each start: what an earlier process still writes is recognised, and refused.
    attempt integer NOT NULL DEFAULT 0,
    version text NOT NULL DEFAULT '',
    gate jsonb,
    promoted boolean NOT NULL DEFAULT false,
    failure_reason text NOT NULL DEFAULT '',
    failure_message text NOT NULL DEFAULT '',
    cancel_comment text NOT NULL DEFAULT '',
    schedule_id text NOT NULL DEFAULT ''
);

CREATE INDEX training_runs_newest ON training_runs (created_at DESC, run_id DESC);
-- At most one run of a model works, whatever the processes believe.
CREATE UNIQUE INDEX training_runs_active ON training_runs (model) WHERE state IN ('RUNNING', 'CANCELLING');
CREATE INDEX training_runs_queued ON training_runs (created_at) WHERE state = 'QUEUED';

CREATE TABLE run_progress (
    run_id text NOT NULL REFERENCES training_runs ON DELETE CASCADE,
    sequence_number bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    stage text NOT NULL,
    message text NOT NULL,
    step bigint NOT NULL DEFAULT 0,
    epoch integer NOT NULL DEFAULT 0,
    max_epochs integer NOT NULL DEFAULT 0,
    loss double precision,
    metrics jsonb NOT NULL DEFAULT '{}',
    remaining_seconds double precision,
    peak_resident_bytes bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (run_id, sequence_number)
);
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute("DROP TABLE run_progress, training_runs")
