"""What alembic runs for every service: migrations inside the service's own schema."""

from __future__ import annotations

import psycopg
import sqlalchemy
from alembic import context


def run(schema: str) -> None:
    """Migrates `schema` over the connection that `shared.database.migrate` prepared.

    The version table lies in the schema, so that services migrate independently of each other.
    """
    config = context.config
    conninfo = config.attributes.get("conninfo")
    if conninfo is None:
        raise SystemExit(f"Run `python -m services.{schema} migrate`, not alembic itself.")
    engine = sqlalchemy.create_engine(
        "postgresql+psycopg://", creator=lambda: psycopg.connect(conninfo), poolclass=sqlalchemy.NullPool
    )
    with engine.connect() as connection:
        # Two replicas that start together must not both migrate.
        connection.execute(
            sqlalchemy.text("SELECT pg_advisory_lock(:lock)"), {"lock": config.attributes["lock"]}
        )
        connection.commit()
        context.configure(connection=connection, version_table_schema=schema, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()
        connection.commit()
