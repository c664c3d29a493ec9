"""Experiments, and the ways to their events and to surveys."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

UPGRADE = """
CREATE TABLE experiments (
    experiment_id text PRIMARY KEY,
    display_name text NOT NULL,
    placement text NOT NULL,
    salt text NOT NULL,
    traffic_fraction double precision NOT NULL,
    variants jsonb NOT NULL,
    primary_metric smallint NOT NULL,
    guard_rails jsonb NOT NULL,
    expected_people bigint NOT NULL,
    report_only boolean NOT NULL,
    state smallint NOT NULL,
    created_at timestamptz NOT NULL,
    stopped_at timestamptz,
    stop_cause smallint,
    version bigint NOT NULL
);
-- A request has one serving configuration, so a shelf has one experiment.
CREATE UNIQUE INDEX experiments_running ON experiments (placement) WHERE state = 1;
CREATE INDEX experiments_newest ON experiments (created_at, experiment_id);

-- Partial: events of no experiment, and of other kinds, pay nothing for them.
CREATE INDEX events_variant ON events (variant, occurred_at) WHERE variant IS NOT NULL;
CREATE INDEX events_surveys ON events (occurred_at) WHERE kind = 17;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute("DROP INDEX events_surveys, events_variant; DROP TABLE experiments;")
