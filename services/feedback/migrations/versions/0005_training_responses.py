"""What shoppers were shown and what they did about it, for whoever trains on it."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# Kind 2 (page view) is an impression, with its position and its propensity; 4, 6, 12 what came of it: cart addition,
# purchase, click. Items that did not stand in the recommendation are no part of it.
UPGRADE = """
CREATE VIEW training_responses_v1 AS
WITH attributed AS NOT MATERIALIZED (
    SELECT e.event_key, e.xid, e.user_key, e.occurred_at, e.kind, e.recommendation_id, e.placement, e.model_version,
        e.item_id, e.position, e.propensity, e.impression_items, e.impression_positions, e.impression_propensities,
        e.line_items, e.line_positions
    FROM events AS e
    LEFT JOIN consents AS c ON c.user_key = e.user_key
    WHERE e.recommendation_id IS NOT NULL
        AND e.kind IN (2, 4, 6, 12)
        AND e.quarantine_reason IS NULL
        AND NOT e.is_bot
        AND (e.consent & 12) <> 4
        AND COALESCE(c.training, true)
        AND NOT EXISTS (
            SELECT FROM (SELECT unnest(t.user_keys) AS user_key FROM tombstones AS t) AS forgotten
            WHERE forgotten.user_key = e.user_key
        )
)
SELECT e.event_key, e.xid, e.user_key, e.occurred_at, e.kind, e.recommendation_id, e.placement, e.model_version,
    i.item_id, i.position, i.propensity
FROM attributed AS e
CROSS JOIN LATERAL unnest(e.impression_items, e.impression_positions, e.impression_propensities)
    AS i (item_id, position, propensity)
WHERE e.kind = 2 AND i.propensity IS NOT NULL
UNION ALL
SELECT e.event_key, e.xid, e.user_key, e.occurred_at, e.kind, e.recommendation_id, e.placement, e.model_version,
    e.item_id, e.position, e.propensity
FROM attributed AS e
WHERE e.kind IN (4, 12) AND e.position IS NOT NULL
UNION ALL
SELECT e.event_key, e.xid, e.user_key, e.occurred_at, e.kind, e.recommendation_id, e.placement, e.model_version,
    l.item_id, l.position, NULL::real
FROM attributed AS e
CROSS JOIN LATERAL unnest(e.line_items, e.line_positions) AS l (item_id, position)
WHERE e.kind = 6 AND l.position IS NOT NULL;

GRANT SELECT ON training_responses_v1 TO shopkeeper_trainer;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute("DROP VIEW training_responses_v1")
