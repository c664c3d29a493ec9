"""Evaluations, tunings, schedules, and the numbers that fence publishers."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE training_runs
    ADD COLUMN task jsonb NOT NULL DEFAULT '{}',
    -- Measures of an evaluation, in the form of a manifest.
    ADD COLUMN evaluation jsonb,
    -- Of a tuning, in order of their end: what was tried, and what it gave.
    ADD COLUMN trials jsonb NOT NULL DEFAULT '[]',
    -- pg_snapshot of the log at the first attempt: a later one reads the same.
    ADD COLUMN read_watermark text NOT NULL DEFAULT '';

-- Each holder of a publishing lease gets a greater number than every one before.
CREATE SEQUENCE publishing_fence;

CREATE TABLE schedules (
    schedule_id text PRIMARY KEY,
    model text NOT NULL,
    config jsonb NOT NULL,
    cron text NOT NULL DEFAULT '',
    drift jsonb,
    paused boolean NOT NULL DEFAULT false,
    next_run_at timestamptz,
    last_run_id text NOT NULL DEFAULT '',
    last_run_at timestamptz,
    checked_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(
        "DROP TABLE schedules; DROP SEQUENCE publishing_fence; "
        "ALTER TABLE training_runs DROP COLUMN task, DROP COLUMN evaluation, DROP COLUMN trials, "
        "DROP COLUMN read_watermark"
    )
