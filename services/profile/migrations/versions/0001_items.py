"""The catalogue: items, with the time of the last write of every field."""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    # COLLATE "C": pages go by the bytes of the id, on every machine alike.
    op.execute("""
        CREATE TABLE profile.items (
            item_id text COLLATE "C" PRIMARY KEY,
            title text NOT NULL,
            description text NOT NULL,
            brand text NOT NULL,
            category_path text[] NOT NULL,
            attributes jsonb NOT NULL,
            price_micros bigint,
            list_price_micros bigint,
            currency_code text NOT NULL,
            stock_quantity bigint,
            primary_item_id text NOT NULL,
            image_uri text NOT NULL,
            image_bytes bytea NOT NULL,
            tags text[] NOT NULL,
            available_from timestamptz,
            available_until timestamptz,
            margin_micros bigint,
            language_code text NOT NULL,
            rating_count bigint,
            rating_mean double precision,
            withdrawn boolean NOT NULL,
            deleted boolean NOT NULL,
            described boolean NOT NULL,
            written_at_us bigint[] NOT NULL,
            revision bigint NOT NULL DEFAULT 1,
            update_time timestamptz NOT NULL DEFAULT clock_timestamp(),
            xid xid8 NOT NULL DEFAULT pg_current_xact_id()
        )
    """)
    op.execute(
        "COMMENT ON COLUMN profile.items.written_at_us IS "
        "'By the field''s number in the contract (22: deleted): microseconds since 1970 of its newest write.'"
    )
    op.execute(
        "COMMENT ON COLUMN profile.items.xid IS 'The transaction that wrote the row last: readers tail by it.'"
    )
    op.execute("CREATE INDEX items_xid ON profile.items (xid)")
    op.execute(
        "CREATE INDEX items_primary_item_id ON profile.items (primary_item_id) WHERE primary_item_id <> ''"
    )


def downgrade() -> None:
    op.execute("DROP TABLE profile.items")
