"""Rebuilds: what portraits are made from, folded from the whole log, for replicas to start from."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE profile.rebuilds (
            rebuild_id uuid PRIMARY KEY,
            request_id text UNIQUE,
            state smallint NOT NULL,
            folded_events bigint NOT NULL DEFAULT 0,
            total_events bigint NOT NULL DEFAULT 0,
            portraits bigint NOT NULL DEFAULT 0,
            watermark bytea NOT NULL DEFAULT '',
            failure_reason text NOT NULL DEFAULT '',
            failure_message text NOT NULL DEFAULT '',
            cancel_requested boolean NOT NULL DEFAULT false,
            created_us bigint NOT NULL,
            ended_us bigint
        )
    """)
    op.execute(
        "COMMENT ON COLUMN profile.rebuilds.watermark IS 'Empty until it has succeeded: then it is in force.'"
    )
    op.execute("""
        CREATE TABLE profile.portraits (
            user_key bytea NOT NULL,
            rebuild_id uuid NOT NULL,
            last_us bigint NOT NULL,
            truncated boolean NOT NULL,
            consented boolean NOT NULL,
            texts text[] NOT NULL,
            events bytea NOT NULL,
            PRIMARY KEY (user_key, rebuild_id)
        )
    """)
    op.execute(
        "COMMENT ON TABLE profile.portraits IS 'The newest events of a shopper, packed, as of a rebuild: what the "
        "portrait is made from. A replica starts from the rebuild in force, and reads the log from there.'"
    )
    op.execute("CREATE INDEX portraits_newest ON profile.portraits (rebuild_id, last_us DESC)")


def downgrade() -> None:
    op.execute("DROP TABLE profile.portraits, profile.rebuilds")
