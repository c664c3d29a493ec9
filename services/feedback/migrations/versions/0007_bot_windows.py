"""Counts by shopper, session and time, from which bots are marked: of the log, and so the same for every replica."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

UPGRADE = """
CREATE TABLE bot_windows (
    -- A user key, or a session key.
    subject_key bytea NOT NULL,
    is_session boolean NOT NULL,
    starts_at timestamptz NOT NULL,
    -- 60 or 3600 seconds.
    seconds smallint NOT NULL,
    -- A rotation stores rows anew under another version; they must not count twice for a session.
    key_version smallint NOT NULL,
    views integer NOT NULL,
    -- Events that a crawler does not send: every kind but item views, and views with a dwell time.
    human_events integer NOT NULL,
    -- Whose events they are, as many as a session is believed to have and one more.
    user_keys bytea[] NOT NULL,
    counted_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (subject_key, starts_at, seconds, is_session, key_version)
);

-- How far the log has been counted: every transaction below is in the windows, none from here on.
CREATE TABLE bot_watermark (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    xid xid8 NOT NULL
);
-- What was stored before was judged as it came in.
INSERT INTO bot_watermark (xid) SELECT pg_current_xact_id();
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute("DROP TABLE bot_watermark, bot_windows")
