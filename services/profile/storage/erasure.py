"""What this service stores of a person goes when feedback says that the person was erased."""

from __future__ import annotations

from typing import Any

import psycopg

from shared.database import trusted_sql
from shared.identity import UserKey

_FORGOTTEN = "(SELECT user_key FROM feedback.tombstones_v1)"
# Tables that hold a row of a person, and the column of their key.
_PERSONAL = (
    ("churn_alerts", "user_key"),
    ("churn_scores", "user_key"),
    ("portraits", "user_key"),
    ("merged_users", "anonymous_key"),
)


def erase_forgotten(connection: psycopg.Connection[Any]) -> list[UserKey]:
    """Removes whoever was erased from every table, and returns everybody who ever was.

    A visitor whom an erased shopper had been goes with them: the row stays, and names nobody, so that events
    which the log may still hold of that visitor are never shown.
    """
    # A visitor who was erased is a part of a shopper who was not: that one is read anew.
    connection.execute(
        trusted_sql(
            "DELETE FROM profile.portraits WHERE user_key IN (SELECT user_key FROM profile.merged_users "  # noqa: S608
            f"WHERE anonymous_key IN {_FORGOTTEN})"
        )
    )
    for table, column in _PERSONAL:
        connection.execute(trusted_sql(f"DELETE FROM profile.{table} WHERE {column} IN {_FORGOTTEN}"))  # noqa: S608
    connection.execute(
        trusted_sql(
            "UPDATE profile.merged_users SET user_key = NULL, xid = pg_current_xact_id() "  # noqa: S608
            f"WHERE user_key IN {_FORGOTTEN}"
        )
    )
    rows = connection.execute(
        "SELECT user_key FROM feedback.tombstones_v1 UNION "
        "SELECT anonymous_key FROM profile.merged_users WHERE user_key IS NULL"
    ).fetchall()
    return [UserKey(bytes(key)) for (key,) in rows]
