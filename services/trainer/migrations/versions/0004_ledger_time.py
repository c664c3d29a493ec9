"""The ledger's time never goes back: a charge is as old as the newest before it at the most."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

UPGRADE = """
CREATE FUNCTION stamp_charge() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    -- A clock that is set back would date a charge into the past, from where it would leave the year too early.
    NEW.charged_at := greatest(clock_timestamp(), (SELECT max(charged_at) FROM privacy_charges));
    RETURN NEW;
END
$$;

CREATE TRIGGER stamped BEFORE INSERT ON privacy_charges
    FOR EACH ROW EXECUTE FUNCTION stamp_charge();

-- After a clock was set back, the newest charge lies ahead of it.
ALTER TABLE privacy_charges DROP CONSTRAINT privacy_charges_charged_at_check;
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    raise RuntimeError("the privacy ledger cannot be taken back")
