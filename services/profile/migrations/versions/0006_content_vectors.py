"""Vectors of texts and pictures by the digest of their content, and the space that they are fused in."""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    # Of the picture as stored: who looks for what is new reads 32 bytes, not the picture.
    op.execute("""
        ALTER TABLE profile.items ADD COLUMN image_digest bytea
            GENERATED ALWAYS AS (CASE WHEN image_bytes = ''::bytea THEN NULL ELSE sha256(image_bytes) END) STORED
    """)
    op.execute("""
        CREATE TABLE profile.content_vectors (
            model text NOT NULL,
            content_digest bytea NOT NULL,
            vector bytea NOT NULL,
            xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
            PRIMARY KEY (model, content_digest)
        )
    """)
    op.execute(
        "COMMENT ON TABLE profile.content_vectors IS 'What an encoder made of a text or a picture, float16, little "
        "endian: by the SHA-256 of the content, so that equal contents are encoded once, for ever.'"
    )
    op.execute("CREATE INDEX content_vectors_xid ON profile.content_vectors (xid)")
    op.execute("""
        CREATE TABLE profile.content_spaces (
            version text PRIMARY KEY,
            arrays bytea NOT NULL,
            fit_time timestamptz NOT NULL DEFAULT clock_timestamp()
        )
    """)
    op.execute(
        "COMMENT ON TABLE profile.content_spaces IS 'The newest is in force: every replica fuses vectors in it.'"
    )


def downgrade() -> None:
    op.execute("DROP TABLE profile.content_spaces, profile.content_vectors")
    op.execute("ALTER TABLE profile.items DROP COLUMN image_digest")
