"""Readers learn how far the log has come on disk: the transactions of all rows, whatever the other views leave out."""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

UPGRADE = """
CREATE VIEW log_transactions_v1 AS
SELECT xid FROM events
UNION ALL SELECT xid FROM consents
UNION ALL SELECT xid FROM tombstones
UNION ALL SELECT xid FROM retired_keys;

GRANT SELECT ON log_transactions_v1 TO shopkeeper_profile, shopkeeper_trainer;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute("DROP VIEW log_transactions_v1")
