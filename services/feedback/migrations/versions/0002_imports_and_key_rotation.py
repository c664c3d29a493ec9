"""Imports that survive a crash, and user keys that can be rotated."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

UPGRADE = """
CREATE TABLE imports (
    import_id uuid PRIMARY KEY,
    -- The caller's name for the request: the same one again finds the same import.
    request_id text UNIQUE,
    state smallint NOT NULL,
    -- ImportSource of the contract as JSON.
    source text NOT NULL,
    -- SHA-256 of the file as it was when the import began; a changed one is not gone on with.
    file_digest bytea,
    -- Events, from the first of the file, whose verdict is durable: a restart goes on behind them.
    settled_events bigint NOT NULL DEFAULT 0,
    read_rows bigint NOT NULL DEFAULT 0,
    total_rows bigint NOT NULL DEFAULT 0,
    stored_rows bigint NOT NULL DEFAULT 0,
    duplicate_rows bigint NOT NULL DEFAULT 0,
    quarantined_rows bigint NOT NULL DEFAULT 0,
    -- Those that the log refused, and those that could not even be read.
    refused_rows bigint NOT NULL DEFAULT 0,
    unreadable_rows bigint NOT NULL DEFAULT 0,
    error_samples jsonb NOT NULL DEFAULT '[]',
    failure text NOT NULL DEFAULT '',
    cancel_requested boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL,
    ended_at timestamptz
);
CREATE INDEX imports_newest ON imports (created_at DESC, import_id DESC);

-- Under which version of the user key a row's key is. A key cannot tell, and one brought forward twice is lost.
ALTER TABLE events ADD COLUMN key_version smallint NOT NULL DEFAULT 1;
ALTER TABLE consents ADD COLUMN key_version smallint NOT NULL DEFAULT 1;
ALTER TABLE data_keys ADD COLUMN key_version smallint NOT NULL DEFAULT 1;

CREATE TABLE key_rotations (
    rotation_id uuid PRIMARY KEY,
    state smallint NOT NULL,
    target_version smallint NOT NULL,
    rows_per_second integer NOT NULL,
    rewritten_rows bigint NOT NULL DEFAULT 0,
    total_rows bigint NOT NULL DEFAULT 0,
    -- Keys up to this one have been looked at in the present pass.
    last_user_key bytea NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL,
    ended_at timestamptz
);

-- Keys that nobody has any more. Readers drop what they hold under them; the person's rows come again under the new key.
CREATE TABLE retired_keys (
    user_key bytea PRIMARY KEY,
    retired_at timestamptz NOT NULL DEFAULT now(),
    xid xid8 NOT NULL DEFAULT pg_current_xact_id()
);
CREATE INDEX retired_keys_xid ON retired_keys (xid);

CREATE OR REPLACE VIEW tombstones_v1 AS
SELECT unnest(t.user_keys) AS user_key, t.xid, t.erased_at FROM tombstones AS t
UNION ALL
SELECT r.user_key, r.xid, r.retired_at FROM retired_keys AS r;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(
        """
        CREATE OR REPLACE VIEW tombstones_v1 AS
        SELECT unnest(t.user_keys) AS user_key, t.xid, t.erased_at FROM tombstones AS t;
        DROP TABLE retired_keys, key_rotations, imports;
        ALTER TABLE data_keys DROP COLUMN key_version;
        ALTER TABLE consents DROP COLUMN key_version;
        ALTER TABLE events DROP COLUMN key_version;
        """
    )
