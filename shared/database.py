"""PostgreSQL: one database, one schema and one role a service.

SQLAlchemy owns the schema and ordinary queries; hot paths take a raw psycopg
connection for COPY and arrays. Every connection acts under the service's own
role, so that the isolation of schemas holds on a developer's machine as in
production.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import sqlalchemy
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout

from shared import deadline
from shared.errors import DeadlineExceeded, FailedPrecondition, ShopkeeperError, Unavailable
from shared.settings import ServiceSettings
from shared.traced_cursor import TracedCursor

OWNERS = ("feedback", "profile", "trainer")
MINIMUM_SERVER_VERSION = 160000
POOL_TIMEOUT_SECONDS = 5.0
_SETUP_LOCK = 0x53484F50  # "SHOP": one process at a time creates roles, or migrates


def role_of(schema: str) -> str:
    """Returns the database role that owns a schema."""
    return f"shopkeeper_{schema}"


class Database:
    """Connections of one service. Open lazily, closed by `close`.

    Args:
        url: postgresql:// URL.
        schema: the service's own schema; unqualified names mean it.
        role: the role that every connection takes; defaults to the schema's owner.
        pool_size: the most raw connections at once.
        statement_timeout_seconds: the server ends a longer statement.
    """

    def __init__(
        self,
        url: str,
        *,
        schema: str,
        role: str | None = None,
        pool_size: int = 8,
        statement_timeout_seconds: float = 60.0,
    ) -> None:
        self.schema = schema
        self.conninfo = _conninfo(url, schema, role or role_of(schema), statement_timeout_seconds)
        self.engine = sqlalchemy.create_engine(
            "postgresql+psycopg://",
            creator=lambda: _CallersConnection.connect(self.conninfo),
            pool_size=pool_size,
            pool_timeout=POOL_TIMEOUT_SECONDS,
            pool_pre_ping=True,
            pool_recycle=1800,
        )
        self._pool = ConnectionPool(
            self.conninfo,
            connection_class=_CallersConnection,
            min_size=1,
            max_size=pool_size,
            timeout=POOL_TIMEOUT_SECONDS,
            reconnect_timeout=30.0,
            check=ConnectionPool.check_connection,
            open=False,
            name=schema,
        )
        self._opened = False

    @contextmanager
    def connect(self) -> Iterator[psycopg.Connection[Any]]:
        """Lends a raw connection; commits at the end of the block, rolls back on an exception.

        Raises:
            Unavailable: no connection to be had, it broke within the block, or the server may not write
                now. Whether the transaction was committed is then unknown: only an idempotent one may
                be retried.
            DeadlineExceeded: the caller of this thread waits no longer; the connection is given up.
        """
        if not self._opened:
            self._pool.open(wait=False)
            self._opened = True
        with (
            unavailable_when_disconnected(),
            self._pool.connection(timeout=_patience_seconds()) as connection,
        ):
            yield connection

    @contextmanager
    def begin(self) -> Iterator[sqlalchemy.Connection]:
        """Lends a SQLAlchemy connection in a transaction; fails as `connect` does."""
        with unavailable_when_disconnected(), self.engine.begin() as connection:
            yield connection

    def dedicated_connection(self, *, autocommit: bool = True) -> psycopg.Connection[Any]:
        """Returns a connection outside of the pools, for LISTEN or a lock. The caller closes it.

        Raises:
            Unavailable: the database cannot be reached.
        """
        with unavailable_when_disconnected():
            return psycopg.connect(self.conninfo, autocommit=autocommit)

    def close(self) -> None:
        """Closes every pooled connection."""
        self._pool.close(timeout=2.0)
        self.engine.dispose()


class _CallersConnection(psycopg.Connection[Any]):
    """A connection whose every wait ends with the deadline of the call that its thread answers.

    A server that stands still answers nothing, not even to a cancellation: the connection is closed then.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cursor_factory = TracedCursor

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        remaining = deadline.remaining_seconds()
        if remaining is None:
            return super().wait(gen, interval, timeout)
        try:
            return super().wait(gen, interval, remaining if timeout is None else min(timeout, remaining))
        except psycopg.OperationalError:
            if deadline.has_passed():
                self.pgconn.finish()
            raise


# What goes away by itself, or by an operator's hand: the request was right, and may be sent again.
_PASSING = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    # A server that was demoted, or told to accept no writes.
    psycopg.errors.ReadOnlySqlTransaction,
)


@contextmanager
def unavailable_when_disconnected() -> Iterator[None]:
    """Turns failures of the server and the way to it into Unavailable, or DeadlineExceeded after the deadline."""
    try:
        yield
    except (*_PASSING, PoolTimeout, PoolClosed, sqlalchemy.exc.TimeoutError) as error:
        raise _failure(error) from error
    except sqlalchemy.exc.DBAPIError as error:
        if isinstance(error.orig, _PASSING):
            raise _failure(error.orig) from error
        raise


def _patience_seconds() -> float:
    remaining = deadline.remaining_seconds()
    return POOL_TIMEOUT_SECONDS if remaining is None else min(POOL_TIMEOUT_SECONDS, remaining)


def _failure(error: Exception) -> ShopkeeperError:
    if deadline.has_passed():
        return DeadlineExceeded(
            "DEADLINE_EXCEEDED",
            "The database did not answer within the deadline; whether it was done is unknown.",
        )
    return _unavailable(error)


def resolve_url(settings: ServiceSettings) -> str:
    """Returns DATABASE_URL, or the URL of the embedded PostgreSQL, started if need be."""
    if settings.database_url:
        return settings.database_url
    from shared import embedded_postgres

    return embedded_postgres.start(settings.home)


def ensure_database(url: str) -> None:
    """Creates the roles and schemas that are missing. Safe to call from many processes at once.

    Raises:
        Unavailable: the database cannot be reached.
        FailedPrecondition: it is too old, or the login may not create what is missing.
    """
    with unavailable_when_disconnected(), psycopg.connect(url, connect_timeout=5) as connection:
        if connection.info.server_version < MINIMUM_SERVER_VERSION:
            raise FailedPrecondition(
                "DATABASE_TOO_OLD",
                f"PostgreSQL {connection.info.server_version // 10000} is too old; use 16 or later.",
            )
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_SETUP_LOCK,))
        try:
            for schema in OWNERS:
                _ensure_owner(connection, schema)
        except psycopg.errors.InsufficientPrivilege as error:
            raise FailedPrecondition(
                "DATABASE_PRIVILEGE_MISSING",
                "The login of DATABASE_URL may not create roles or schemas. Let an administrator create the roles "
                f"{', '.join(map(role_of, OWNERS))}, a schema for each, and grant the roles to this login.",
            ) from error


def migrate(url: str, service: str) -> None:
    """Brings a service's schema to the newest version, under the schema owner's role.

    Args:
        url: postgresql:// URL.
        service: `feedback`, `profile` or `trainer`; migrations lie in `services/<service>/migrations`.
    """
    from alembic import command
    from alembic.config import Config

    ensure_database(url)
    config = Config()
    scripts = importlib.resources.files(f"services.{service}") / "migrations"
    config.set_main_option("script_location", str(scripts))
    config.attributes["conninfo"] = _conninfo(url, service, role_of(service), 600.0)
    config.attributes["schema"] = service
    config.attributes["lock"] = _SETUP_LOCK
    with unavailable_when_disconnected():
        command.upgrade(config, "head")


def _ensure_owner(connection: psycopg.Connection[Any], schema: str) -> None:
    role = sql.Identifier(role_of(schema))
    exists = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (role_of(schema),)).fetchone()
    if not exists:
        connection.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(role))
    member = connection.execute("SELECT pg_has_role(current_user, %s, 'SET')", (role_of(schema),)).fetchone()
    if not member or not member[0]:
        connection.execute(sql.SQL("GRANT {} TO CURRENT_USER").format(role))
    exists = connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", (schema,)).fetchone()
    if not exists:
        connection.execute(sql.SQL("CREATE SCHEMA {} AUTHORIZATION {}").format(sql.Identifier(schema), role))


def _conninfo(url: str, schema: str, role: str, statement_timeout_seconds: float) -> str:
    options = " ".join(
        (
            str(conninfo_to_dict(url).get("options") or ""),
            f"-c role={role}",
            f"-c search_path={schema},pg_catalog",
            f"-c statement_timeout={int(statement_timeout_seconds * 1000)}",
            "-c timezone=UTC",
        )
    ).strip()
    return make_conninfo(
        url,
        options=options,
        application_name=f"shopkeeper-{schema}",
        connect_timeout=5,
        keepalives_idle=10,
        keepalives_interval=5,
        keepalives_count=3,
    )


def trusted_sql(text: str) -> sql.SQL:
    """Returns SQL that the program itself composed, never from input."""
    return sql.SQL(text)


def _unavailable(error: Exception) -> Unavailable:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return Unavailable(
        "DATABASE_UNAVAILABLE",
        "The database cannot be reached now; retry. If it lasts, check DATABASE_URL; `shopkeeper doctor` says more.",
        {"cause": first_line[:200]},
        retry_after_seconds=0.5,
    )
