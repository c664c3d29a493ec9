"""The ledger of what releases told about people: rows are added, and never change."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

UPGRADE = """
-- No reference to training_runs: a charge outlives its run.
CREATE TABLE privacy_charges (
    charge_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run_id text NOT NULL,
    attempt integer NOT NULL,
    model text NOT NULL,
    epsilon double precision NOT NULL CHECK (epsilon > 0 AND epsilon < 'infinity'),
    delta double precision NOT NULL CHECK (delta > 0 AND delta < 1),
    mechanism text NOT NULL,
    releases jsonb NOT NULL CHECK (jsonb_array_length(releases) > 0),
    charged_at timestamptz NOT NULL DEFAULT clock_timestamp() CHECK (charged_at <= clock_timestamp()),
    UNIQUE (run_id, attempt)
);

CREATE INDEX privacy_charges_newest ON privacy_charges (charged_at);

CREATE FUNCTION refuse_change_of_ledger() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the privacy ledger is append-only: what was told about people cannot be taken back'
        USING ERRCODE = 'insufficient_privilege';
END
$$;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON privacy_charges
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change_of_ledger();

-- The owner too: whoever wants to change it must first say so.
REVOKE UPDATE, DELETE, TRUNCATE ON privacy_charges FROM shopkeeper_trainer;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    raise RuntimeError("the privacy ledger cannot be taken back")
