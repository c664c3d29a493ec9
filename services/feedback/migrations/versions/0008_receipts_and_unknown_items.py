"""Receipts can be issued anew, by the watermarks of model versions; items that the catalogue does not know are counted."""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

UPGRADE = """
ALTER TABLE tombstones
    -- The transaction that buried the person: who read the log without seeing it may hold their events. Null where it
    -- is not known in this cluster: erased by an older build, or replayed after a restore.
    ADD COLUMN buried_xid xid8,
    -- The database's clock when it had certainly been committed; who began to read later saw it.
    ADD COLUMN settled_at timestamptz;

-- What a receipt says of the rows, so that it can be issued anew.
CREATE TABLE erasure_receipts (
    receipt_id uuid PRIMARY KEY,
    tombstone_key bytea NOT NULL,
    user_keys bytea[] NOT NULL,
    erased_rows jsonb NOT NULL,
    issued_at timestamptz NOT NULL
);

CREATE TABLE unknown_items (
    item_id text PRIMARY KEY,
    event_count bigint NOT NULL,
    first_seen_at timestamptz NOT NULL,
    last_seen_at timestamptz NOT NULL
);
CREATE INDEX unknown_items_most ON unknown_items (event_count DESC, item_id);

-- How far the log has been compared with the catalogue: every transaction below has been, none from here on.
CREATE TABLE unknown_items_watermark (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    xid xid8 NOT NULL,
    -- When that was the whole log.
    compared_at timestamptz
);
INSERT INTO unknown_items_watermark (xid) VALUES ('0');

-- Transactions that stored rows anew, as a rotation of keys does. Their rows were counted before, but for those named.
CREATE TABLE rewriting_transactions (xid xid8 PRIMARY KEY);
CREATE TABLE rewritten_uncounted (event_key uuid PRIMARY KEY, xid xid8 NOT NULL);
CREATE INDEX rewritten_uncounted_xid ON rewritten_uncounted (xid);
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(
        """
        DROP TABLE rewritten_uncounted, rewriting_transactions, unknown_items_watermark, unknown_items, erasure_receipts;
        ALTER TABLE tombstones DROP COLUMN buried_xid, DROP COLUMN settled_at;
        """
    )
