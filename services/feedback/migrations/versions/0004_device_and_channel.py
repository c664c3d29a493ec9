"""Tell readers of the log on what device, and through what channel, an event happened."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# The columns come last: readers of the view as it was go on as they did.
UPGRADE = """
CREATE OR REPLACE VIEW events_v1 AS
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
    (COALESCE(c.personalisation, true) AND (e.consent & 3) <> 1) AS personalisation,
    e.device,
    e.channel
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
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    # A view cannot lose columns in place; who may read it is said again.
    op.execute(
        "DROP VIEW events_v1;"
        + UPGRADE.replace("CREATE OR REPLACE", "CREATE").replace(
            "AS personalisation,\n    e.device,\n    e.channel", "AS personalisation"
        )
        + "GRANT SELECT ON events_v1 TO shopkeeper_profile, shopkeeper_trainer;"
    )
