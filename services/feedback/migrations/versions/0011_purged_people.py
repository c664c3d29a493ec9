"""Receipts know of events that went before the person was forgotten: models may hold them still."""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

UPGRADE = """
-- Whose events a purge or the retention took, and when the first of them had come in. Goes with the person.
CREATE TABLE purged_people (
    user_key bytea PRIMARY KEY,
    key_version smallint NOT NULL,
    first_received_at timestamptz NOT NULL
);
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute("DROP TABLE purged_people")
