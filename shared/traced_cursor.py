"""Statements as spans: a trace goes on from a call down to its SQL.

Of a statement a span holds the text, never a parameter: those can be what a person did or wrote. For the same
reason an error is told by its class and its SQLSTATE, not by its message, whose details quote rows. Names are
those of https://opentelemetry.io/docs/specs/semconv/database/postgresql.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode
from psycopg import sql

_LONGEST_TEXT = 2_000
_tracer = trace.get_tracer("shopkeeper.sql")


class TracedCursor(psycopg.Cursor[Any]):
    """A cursor whose every statement is a span of the call under way, where there is one that is recorded."""

    def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        """As `psycopg.Cursor.execute`."""
        with _statement(query):
            return super().execute(query, *args, **kwargs)

    def executemany(self, query: Any, *args: Any, **kwargs: Any) -> None:
        """As `psycopg.Cursor.executemany`."""
        with _statement(query):
            super().executemany(query, *args, **kwargs)

    @contextmanager
    def copy(self, statement: Any, *args: Any, **kwargs: Any) -> Iterator[psycopg.Copy]:
        """As `psycopg.Cursor.copy`; the span ends with the block."""
        with _statement(statement), super().copy(statement, *args, **kwargs) as copy:
            yield copy


def _text(query: Any) -> str:
    """Returns a statement that the program holds as it stands; a composed one may quote values."""
    if isinstance(query, sql.SQL):
        query = query.as_string(None)
    return query.strip() if isinstance(query, str) else ""


@contextmanager
def _statement(query: Any) -> Iterator[None]:
    if not trace.get_current_span().is_recording():
        yield
        return
    text = _text(query)
    operation = (text or "SQL").split(None, 1)[0].upper()
    attributes = {"db.system.name": "postgresql", "db.operation.name": operation}
    if text:
        attributes["db.query.text"] = text[:_LONGEST_TEXT]
    with _tracer.start_as_current_span(
        operation,
        kind=SpanKind.CLIENT,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield
        except psycopg.Error as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_attribute("db.response.status_code", error.sqlstate or "")
            span.set_status(StatusCode.ERROR)
            raise
