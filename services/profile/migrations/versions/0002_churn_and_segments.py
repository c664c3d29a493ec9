"""Churn: what was said last of everybody, and the alerts. Segments, with every version of their filters."""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE profile.churn_scores (
            user_key bytea NOT NULL,
            horizon_days integer NOT NULL,
            probability double precision NOT NULL,
            PRIMARY KEY (user_key, horizon_days)
        )
    """)
    op.execute(
        "COMMENT ON TABLE profile.churn_scores IS "
        "'The probability that alerts know of: moved when the whole percent changes.'"
    )
    op.execute("""
        CREATE TABLE profile.churn_alerts (
            alert_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
            user_key bytea NOT NULL,
            horizon_days integer NOT NULL,
            previous_probability double precision NOT NULL,
            probability double precision NOT NULL,
            model_version text NOT NULL,
            alert_time timestamptz NOT NULL DEFAULT clock_timestamp()
        )
    """)
    op.execute("CREATE INDEX churn_alerts_user_key ON profile.churn_alerts (user_key)")
    op.execute("""
        CREATE TABLE profile.segments (
            segment_id text COLLATE "C" PRIMARY KEY,
            display_name text NOT NULL,
            description text NOT NULL,
            version bigint NOT NULL DEFAULT 1,
            revision bigint NOT NULL DEFAULT 1,
            request_id text NOT NULL,
            create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
            update_time timestamptz NOT NULL DEFAULT clock_timestamp()
        )
    """)
    op.execute("""
        CREATE TABLE profile.segment_versions (
            segment_id text COLLATE "C" NOT NULL REFERENCES profile.segments ON DELETE CASCADE,
            version bigint NOT NULL,
            filter text NOT NULL,
            PRIMARY KEY (segment_id, version)
        )
    """)
    op.execute(
        "CREATE UNIQUE INDEX segments_request_id ON profile.segments (request_id) WHERE request_id <> ''"
    )


def downgrade() -> None:
    op.execute(
        "DROP TABLE profile.segment_versions, profile.segments, profile.churn_alerts, profile.churn_scores"
    )
