"""Windows in which bots are sought keep when views were, from which equal intervals are seen."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Of windows of 3600 seconds: milliseconds since its beginning, distinct, the earliest ones, ascending.
    op.execute("ALTER TABLE bot_windows ADD COLUMN moments integer[] NOT NULL DEFAULT '{}'")


def downgrade() -> None:
    op.execute("ALTER TABLE bot_windows DROP COLUMN moments")
