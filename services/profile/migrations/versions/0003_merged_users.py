"""Anonymous visitors who signed in: their ids stand for the shopper they turned out to be."""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.execute("""
        CREATE TABLE profile.merged_users (
            anonymous_key bytea PRIMARY KEY,
            user_key bytea,
            key_version integer NOT NULL,
            merge_time timestamptz NOT NULL DEFAULT clock_timestamp(),
            xid xid8 NOT NULL DEFAULT pg_current_xact_id()
        )
    """)
    op.execute(
        "COMMENT ON COLUMN profile.merged_users.user_key IS "
        "'Who stands for both, never merged itself. Null once that shopper was erased: the visitor went with them.'"
    )
    op.execute("CREATE INDEX merged_users_user_key ON profile.merged_users (user_key)")
    op.execute("CREATE INDEX merged_users_xid ON profile.merged_users (xid)")


def downgrade() -> None:
    op.execute("DROP TABLE profile.merged_users")
