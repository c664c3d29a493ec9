"""A run says what it read: the set of day files and the catalogue."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE training_runs ADD COLUMN data_snapshot jsonb")


def downgrade() -> None:
    op.execute("ALTER TABLE training_runs DROP COLUMN data_snapshot")
