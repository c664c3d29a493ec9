"""The append-only ledger of privacy charges, in Postgres."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from services.trainer.domain.privacy import BUDGET_YEAR, GaussianRelease, PrivacyBudget, PrivacyCharge
from shared.database import Database, trusted_sql
from shared.errors import FailedPrecondition

_CHARGING = 0x44504C47  # "DPLG": one process at a time charges

_SELECT = "SELECT run_id, attempt, model, epsilon, delta, mechanism, releases, charged_at FROM privacy_charges WHERE "

Compose = Callable[[Sequence[PrivacyCharge], float], float]


class PostgresPrivacyLedger:
    """Charges and reads the ledger; implements `ports.PrivacyLedger`.

    Args:
        epsilon_limit: the most epsilon, of all models together, in any 365 days.
        delta: at which that is stated.
        compose: returns the epsilon at a delta of several charges, such as `accounting.epsilon_of_ledger`.
    """

    def __init__(self, database: Database, epsilon_limit: float, delta: float, compose: Compose) -> None:
        self._database, self._compose = database, compose
        self._epsilon_limit, self._delta = epsilon_limit, delta

    def charge(self, charge: PrivacyCharge) -> PrivacyBudget:
        """Writes a charge down for ever, durably, before it returns; whoever is refused is not charged.

        Raises:
            FailedPrecondition: PRIVACY_BUDGET_EXHAUSTED: the last 365 days and this one exceed the limit.
            Unavailable: the database cannot be reached; whether the charge was written is unknown, and it stays
                if it was.
        """
        with self._database.connect() as connection:
            # One charge at a time: two that fit alone might not fit together.
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (_CHARGING,))
            connection.execute("SET LOCAL synchronous_commit = on")
            year = self._of_last_year(connection)
            spent = self._compose([*year, charge], self._delta)
            if spent > self._epsilon_limit:
                raise self._refusal(year, charge, spent)
            connection.execute(
                "INSERT INTO privacy_charges (run_id, attempt, model, epsilon, delta, mechanism, releases) "
                "VALUES (%s, %s, %s, %s, %s, %s, %s)",
                (
                    charge.run_id,
                    charge.attempt,
                    charge.model,
                    charge.epsilon,
                    charge.delta,
                    charge.mechanism,
                    Jsonb([release.to_json() for release in charge.releases]),
                ),
            )
        return PrivacyBudget(self._epsilon_limit, spent, self._delta, [*year, charge])

    def _refusal(
        self, year: Sequence[PrivacyCharge], charge: PrivacyCharge, spent: float
    ) -> FailedPrecondition:
        left = max(self._epsilon_limit - self._compose(year, self._delta), 0.0)
        fits_at = self._fits_at(year, charge)
        remedy = (
            f"Ask for less, or ask again after {fits_at}, when older charges are a year old."
            if fits_at
            else "It would not fit into an empty year either: ask for less."
        )
        return FailedPrecondition(
            "PRIVACY_BUDGET_EXHAUSTED",
            f"Epsilon {charge.epsilon:g} more would make {spent:.3g} in 365 days, of at most {self._epsilon_limit:g} "
            f"(delta {self._delta:g}); {left:.3g} is left. {remedy}",
            {"model": charge.model, "epsilonLeft": f"{left:.6g}", "fitsAt": fits_at},
        )

    def _fits_at(self, year: Sequence[PrivacyCharge], charge: PrivacyCharge) -> str:
        """Returns from when on the charge would fit, were nothing else charged; empty: never."""
        for kept in range(len(year) - 1, -1, -1):
            # Newest first: what goes from the year next is the last that is kept.
            if self._compose([*year[:kept], charge], self._delta) <= self._epsilon_limit:
                charged_at = year[kept].charged_at
                assert charged_at is not None
                # Up to the second after.
                return (charged_at + BUDGET_YEAR + timedelta(seconds=1)).isoformat(timespec="seconds")
        return ""

    def budget(self, model: str) -> PrivacyBudget:
        """Returns limit and spending of all models, and the charges of one."""
        with self._database.connect() as connection:
            spent = self._compose(self._of_last_year(connection), self._delta)
            charges = _read(connection, "model = %s", (model,))
        return PrivacyBudget(self._epsilon_limit, spent, self._delta, charges)

    def _of_last_year(self, connection: psycopg.Connection[Any]) -> list[PrivacyCharge]:
        return _read(connection, "charged_at > clock_timestamp() - %s", (BUDGET_YEAR,))


def _read(
    connection: psycopg.Connection[Any], where: str, arguments: tuple[object, ...]
) -> list[PrivacyCharge]:
    with connection.cursor(row_factory=dict_row) as cursor:
        rows = cursor.execute(trusted_sql(_SELECT + where + " ORDER BY charge_id DESC"), arguments).fetchall()
    return [
        PrivacyCharge(**{**row, "releases": tuple(GaussianRelease(**release) for release in row["releases"])})
        for row in rows
    ]
