"""The log, consent, data keys, tombstones, and the views that others read."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

UPGRADE = """
-- One row an event. Partitioned on the key, whose first 48 bits are the time: one primary key gives time
-- partitions, append-only inserts and de-duplication for ever. Wide columns first, so that no row is padded.
CREATE TABLE events (
    event_key uuid NOT NULL,
    -- The transaction that stored the row. Readers tail by snapshots of it, never by a sequence. It has a meaning
    -- within this cluster alone: a logical copy must renumber it, a physical one keeps it.
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    payload_digest bigint NOT NULL,
    occurred_at timestamptz NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    price_micros bigint,
    quantity real,
    value real,
    propensity real,
    position integer,
    kind smallint NOT NULL,
    device smallint NOT NULL,
    channel smallint NOT NULL,
    consent smallint NOT NULL,
    quarantine_reason smallint,
    is_bot boolean NOT NULL DEFAULT false,
    user_key bytea NOT NULL,
    session_key bytea,
    item_id text,
    currency_code text,
    recommendation_id bytea,
    placement text,
    serving_config text,
    model_version text,
    variant text,
    line_items text[],
    line_quantities real[],
    line_prices bigint[],
    line_positions integer[],
    impression_items text[],
    impression_positions integer[],
    impression_propensities real[],
    -- Encrypted under the person's own key; see storage/text_cipher.py.
    text bytea,
    attributes jsonb,
    PRIMARY KEY (event_key)
) PARTITION BY RANGE (event_key);

CREATE INDEX events_xid ON events (xid);
CREATE INDEX events_user ON events (user_key, event_key);
CREATE INDEX events_attributed ON events (occurred_at) WHERE recommendation_id IS NOT NULL;

-- Takes what no month has a partition for, so that nothing is ever lost.
CREATE TABLE events_default PARTITION OF events DEFAULT;

CREATE TABLE consents (
    user_key bytea PRIMARY KEY,
    personalisation boolean,
    training boolean,
    marketing boolean,
    updated_at timestamptz NOT NULL,
    xid xid8 NOT NULL DEFAULT pg_current_xact_id()
);
CREATE INDEX consents_xid ON consents (xid);

CREATE TABLE data_keys (
    key_id uuid PRIMARY KEY,
    user_key bytea NOT NULL UNIQUE,
    wrapped_key bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- The tombstone key outlives rotations of the user key. The user keys stay, so that readers can drop what they hold.
CREATE TABLE tombstones (
    tombstone_key bytea PRIMARY KEY,
    user_keys bytea[] NOT NULL,
    erased_at timestamptz NOT NULL,
    -- Null while rows may still be there: an erasure cut short is taken up again at the next start.
    completed_at timestamptz,
    xid xid8 NOT NULL DEFAULT pg_current_xact_id()
);
CREATE INDEX tombstones_xid ON tombstones (xid);

CREATE VIEW events_v1 AS
SELECT
    e.event_key,
    COALESCE(l.line, 0::smallint) AS line,
    e.xid,
    e.user_key,
    e.kind,
    e.occurred_at,
    COALESCE(l.item_id, e.item_id) AS item_id,
    COALESCE(l.quantity, e.quantity) AS quantity,
    COALESCE(l.price_micros, e.price_micros) AS price_micros,
    e.currency_code,
    e.value,
    e.session_key,
    e.placement,
    e.model_version,
    e.serving_config,
    e.variant,
    e.is_bot,
    -- Both may narrow, neither may widen: 1 says that the event stated it, 2 what it stated.
    (COALESCE(c.personalisation, true) AND (e.consent & 3) <> 1) AS personalisation
FROM events AS e
LEFT JOIN LATERAL (
    SELECT (u.ordinality - 1)::smallint AS line, u.item_id, u.quantity, u.price_micros
    FROM unnest(e.line_items, e.line_quantities, e.line_prices)
        WITH ORDINALITY AS u (item_id, quantity, price_micros, ordinality)
    -- Asked once a row, before the function is called: most events have no lines.
    WHERE e.line_items IS NOT NULL
) AS l ON true
LEFT JOIN consents AS c ON c.user_key = e.user_key
WHERE e.quarantine_reason IS NULL;

CREATE VIEW training_events_v1 AS
SELECT
    e.event_key,
    COALESCE(l.line, 0::smallint) AS line,
    e.xid,
    e.user_key,
    e.kind,
    e.occurred_at,
    COALESCE(l.item_id, e.item_id) AS item_id,
    COALESCE(l.quantity, e.quantity) AS quantity,
    COALESCE(l.price_micros, e.price_micros) AS price_micros,
    e.currency_code,
    e.value,
    e.session_key,
    e.is_bot,
    (COALESCE(c.personalisation, true) AND (e.consent & 3) <> 1) AS personalisation
FROM events AS e
LEFT JOIN LATERAL (
    SELECT (u.ordinality - 1)::smallint AS line, u.item_id, u.quantity, u.price_micros
    FROM unnest(e.line_items, e.line_quantities, e.line_prices)
        WITH ORDINALITY AS u (item_id, quantity, price_micros, ordinality)
    -- Asked once a row, before the function is called: most events have no lines.
    WHERE e.line_items IS NOT NULL
) AS l ON true
LEFT JOIN consents AS c ON c.user_key = e.user_key
WHERE e.quarantine_reason IS NULL
    AND NOT e.is_bot
    AND (e.consent & 12) <> 4
    AND COALESCE(c.training, true)
    AND COALESCE(l.item_id, e.item_id) IS NOT NULL
    AND NOT EXISTS (
        SELECT FROM (SELECT unnest(t.user_keys) AS user_key FROM tombstones AS t) AS forgotten
        WHERE forgotten.user_key = e.user_key
    );

CREATE VIEW tombstones_v1 AS
SELECT unnest(t.user_keys) AS user_key, t.xid, t.erased_at FROM tombstones AS t;

CREATE VIEW consents_v1 AS
SELECT
    c.user_key,
    COALESCE(c.personalisation, true) AS personalisation,
    COALESCE(c.training, true) AS training,
    COALESCE(c.marketing, false) AS marketing,
    c.updated_at,
    c.xid
FROM consents AS c;

GRANT USAGE ON SCHEMA feedback TO shopkeeper_profile, shopkeeper_trainer;
GRANT SELECT ON events_v1, training_events_v1, tombstones_v1, consents_v1 TO shopkeeper_profile, shopkeeper_trainer;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute(
        """
        DROP VIEW consents_v1, tombstones_v1, training_events_v1, events_v1;
        DROP TABLE tombstones, data_keys, consents, events;
        """
    )
