"""Tombstones remember since when models may hold the person, so that every receipt can say which."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE tombstones ADD COLUMN first_received_at timestamptz")


def downgrade() -> None:
    op.execute("ALTER TABLE tombstones DROP COLUMN first_received_at")
