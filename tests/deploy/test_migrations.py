"""Expand, migrate, contract: while versions N and N+1 run side by side, neither may find the schema unfit.

A migration only adds, unless it says in a line `# contract: …` why no reader of the version before needs what it takes away.
"""

from __future__ import annotations

import importlib.util
import io
import re
from pathlib import Path

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations

from tests.deploy.kustomize import REPOSITORY

MIGRATIONS = sorted(REPOSITORY.glob("services/*/migrations/versions/*.py"))
MARKER = re.compile(r"^# contract: \S.{20,}", re.M)


def sql_of(path: Path) -> str:
    """Returns what `upgrade` would execute."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql", opts={"as_sql": True, "output_buffer": written}
    )
    with Operations.context(context):
        module.upgrade()
    return written.getvalue()


def contractions(sql: str) -> list[str]:
    """Returns the statements that take away, or ask more than before, of tables that stood there before."""
    bare = re.sub(r"--[^\n]*", "", sql)
    # What a function does is no change of the schema.
    bare = re.sub(r"\$(\w*)\$.*?\$\1\$", "''", bare, flags=re.S)
    new_tables = set(re.findall(r"\bCREATE TABLE (?:IF NOT EXISTS )?([\w.\"]+)", bare, re.I))
    found = []
    for statement in (re.sub(r"\s+", " ", each).strip() for each in bare.split(";")):
        if re.match(
            r"(DROP (TABLE|VIEW|MATERIALIZED|TYPE|SCHEMA|FUNCTION|SEQUENCE|TRIGGER)|TRUNCATE|DELETE FROM)\b",
            statement,
            re.I,
        ):
            found.append(statement)
        match = re.match(r"ALTER (?:TABLE|VIEW)(?: ONLY)?(?: IF EXISTS)? ([\w.\"]+) (.*)", statement, re.I)
        if match is None or match[1] in new_tables:
            continue
        for action in re.split(r",\s*(?=ADD|ALTER|DROP|RENAME)", match[2]):
            taken = re.search(
                r"\bDROP COLUMN|\bRENAME\b|\bSET NOT NULL|\bALTER COLUMN \S+ (SET DATA )?TYPE|\bALTER \S+ TYPE"
                r"|^ADD CONSTRAINT|^ADD (UNIQUE|CHECK|FOREIGN|PRIMARY)",
                action, re.I,
            )  # fmt: skip
            blind = re.match(r"ADD (COLUMN )?.*NOT NULL", action, re.I) and not re.search(
                r"DEFAULT|GENERATED", action, re.I
            )
            if taken or blind:
                found.append(f"ALTER {match[1]} {action}")
    return found


@pytest.mark.parametrize("path", MIGRATIONS, ids=lambda path: f"{path.parts[-4]}/{path.stem}")
def test_a_migration_only_expands_or_says_why_not(path: Path) -> None:
    taken = contractions(sql_of(path))
    if not MARKER.search(path.read_text()):
        assert taken == [], "expand first; contract one release later, with a line `# contract: why`"


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE events;", "DROP VIEW events_v1;", "TRUNCATE events;", "DELETE FROM events;",
        "ALTER TABLE events DROP COLUMN kind;", "ALTER TABLE events RENAME COLUMN kind TO sort;",
        "ALTER TABLE events ADD COLUMN a int NOT NULL;", "ALTER TABLE events ALTER COLUMN kind TYPE text;",
        "ALTER TABLE events ALTER COLUMN kind SET NOT NULL;", "ALTER TABLE events ADD COLUMN b int, DROP COLUMN c;",
        "ALTER TABLE events ADD CONSTRAINT positive CHECK (kind > 0);", "-- harmless\nDROP TABLE events;",
    ],
)  # fmt: skip
def test_what_takes_away_is_recognised(sql: str) -> None:
    assert contractions(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE TABLE a (b int NOT NULL); ALTER TABLE a ADD CONSTRAINT c CHECK (b > 0);",
        "ALTER TABLE events ADD COLUMN a int NOT NULL DEFAULT 1, ADD COLUMN b text;", "CREATE INDEX i ON events (kind);",
        "ALTER TABLE events ALTER COLUMN kind DROP NOT NULL;", "-- DROP TABLE events;\nSELECT 1;",
        "CREATE FUNCTION f() RETURNS void AS $$ DELETE FROM events; $$ LANGUAGE sql;",
        "CREATE TRIGGER t BEFORE UPDATE OR DELETE OR TRUNCATE ON a EXECUTE FUNCTION f();",
    ],
)  # fmt: skip
def test_what_only_adds_passes(sql: str) -> None:
    assert contractions(sql) == []
