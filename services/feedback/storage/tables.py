"""The feedback schema, as the ordinary queries see it. The migrations create it."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

metadata = sa.MetaData(schema="feedback")

XID8 = sa.text("pg_current_xact_id()")

events = sa.Table(
    "events",
    metadata,
    sa.Column("event_key", pg.UUID(as_uuid=True), primary_key=True),
    sa.Column("occurred_at", sa.DateTime(timezone=True)),
    sa.Column("received_at", sa.DateTime(timezone=True)),
    sa.Column("price_micros", sa.BigInteger),
    sa.Column("quantity", sa.REAL),
    sa.Column("value", sa.REAL),
    sa.Column("propensity", sa.REAL),
    sa.Column("position", sa.Integer),
    sa.Column("kind", sa.SmallInteger),
    sa.Column("device", sa.SmallInteger),
    sa.Column("channel", sa.SmallInteger),
    sa.Column("consent", sa.SmallInteger),
    sa.Column("quarantine_reason", sa.SmallInteger),
    sa.Column("is_bot", sa.Boolean),
    sa.Column("user_key", sa.LargeBinary),
    sa.Column("session_key", sa.LargeBinary),
    sa.Column("item_id", sa.Text),
    sa.Column("currency_code", sa.Text),
    sa.Column("recommendation_id", sa.LargeBinary),
    sa.Column("placement", sa.Text),
    sa.Column("serving_config", sa.Text),
    sa.Column("model_version", sa.Text),
    sa.Column("variant", sa.Text),
    sa.Column("line_items", pg.ARRAY(sa.Text)),
    sa.Column("line_quantities", pg.ARRAY(sa.REAL)),
    sa.Column("line_prices", pg.ARRAY(sa.BigInteger)),
    sa.Column("line_positions", pg.ARRAY(sa.Integer)),
    sa.Column("impression_items", pg.ARRAY(sa.Text)),
    sa.Column("impression_positions", pg.ARRAY(sa.Integer)),
    sa.Column("impression_propensities", pg.ARRAY(sa.REAL)),
    sa.Column("text", sa.LargeBinary),
    sa.Column("attributes", pg.JSONB),
)

consents = sa.Table(
    "consents",
    metadata,
    sa.Column("user_key", sa.LargeBinary, primary_key=True),
    sa.Column("personalisation", sa.Boolean),
    sa.Column("training", sa.Boolean),
    sa.Column("marketing", sa.Boolean),
    sa.Column("updated_at", sa.DateTime(timezone=True)),
    sa.Column("xid", sa.Text, server_default=XID8),
    sa.Column("key_version", sa.SmallInteger),
)

data_keys = sa.Table(
    "data_keys",
    metadata,
    sa.Column("key_id", pg.UUID(as_uuid=True), primary_key=True),
    sa.Column("user_key", sa.LargeBinary),
    sa.Column("wrapped_key", sa.LargeBinary),
)

tombstones = sa.Table(
    "tombstones",
    metadata,
    sa.Column("tombstone_key", sa.LargeBinary, primary_key=True),
    sa.Column("user_keys", pg.ARRAY(sa.LargeBinary)),
    sa.Column("erased_at", sa.DateTime(timezone=True)),
    sa.Column("completed_at", sa.DateTime(timezone=True)),
    sa.Column("first_received_at", sa.DateTime(timezone=True)),
    sa.Column("buried_xid", sa.Text),
    sa.Column("settled_at", sa.DateTime(timezone=True)),
    sa.Column("xid", sa.Text, server_default=XID8),
)

experiments = sa.Table(
    "experiments",
    metadata,
    sa.Column("experiment_id", sa.Text, primary_key=True),
    sa.Column("display_name", sa.Text),
    sa.Column("placement", sa.Text),
    sa.Column("salt", sa.Text),
    sa.Column("traffic_fraction", sa.Double),
    sa.Column("variants", pg.JSONB),
    sa.Column("primary_metric", sa.SmallInteger),
    sa.Column("guard_rails", pg.JSONB),
    sa.Column("expected_people", sa.BigInteger),
    sa.Column("report_only", sa.Boolean),
    sa.Column("state", sa.SmallInteger),
    sa.Column("created_at", sa.DateTime(timezone=True)),
    sa.Column("stopped_at", sa.DateTime(timezone=True)),
    sa.Column("stop_cause", sa.SmallInteger),
    sa.Column("version", sa.BigInteger),
)
