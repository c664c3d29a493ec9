"""Imports of items: work that outlives a process."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE profile.item_imports (
            import_id uuid PRIMARY KEY,
            request_id text UNIQUE,
            state smallint NOT NULL,
            source bytea NOT NULL,
            write_time_us bigint NOT NULL,
            read_rows bigint NOT NULL DEFAULT 0,
            stored_rows bigint NOT NULL DEFAULT 0,
            superseded_rows bigint NOT NULL DEFAULT 0,
            rejected_rows bigint NOT NULL DEFAULT 0,
            rejected jsonb NOT NULL DEFAULT '[]',
            progress double precision NOT NULL DEFAULT 0,
            failure_reason text NOT NULL DEFAULT '',
            failure_message text NOT NULL DEFAULT '',
            cancel_requested boolean NOT NULL DEFAULT false,
            created_us bigint NOT NULL,
            ended_us bigint
        )
    """)
    op.execute(
        "COMMENT ON COLUMN profile.item_imports.source IS 'ImportItemsRequest of the contract, encoded.'"
    )
    op.execute("CREATE INDEX item_imports_newest ON profile.item_imports (created_us DESC, import_id DESC)")


def downgrade() -> None:
    op.execute("DROP TABLE profile.item_imports")
