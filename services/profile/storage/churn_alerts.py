"""What was said of everybody's risk last, and the alerts that followed from it."""

from __future__ import annotations

from collections.abc import Sequence

from services.profile.ports import StoredAlert
from services.profile.storage.erasure import erase_forgotten
from shared.database import Database
from shared.identity import UserKey

KEPT_DAYS = 30
# One writer at a time, so that ids of alerts become visible in their order.
_LOCK = 0x53484F50_43485552


class PostgresChurnAlerts:
    """Implements `ports.ChurnAlerts`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(
        self,
        user_keys: Sequence[bytes],
        probabilities: Sequence[float],
        horizon_days: int,
        model_version: str,
    ) -> int:
        """See `ports.ChurnAlerts`."""
        with self._database.connect() as connection:
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            parameters = {
                "keys": list(user_keys),
                "probabilities": list(probabilities),
                "horizon": horizon_days,
                "version": model_version,
            }
            cursor = connection.execute(
                """
                INSERT INTO profile.churn_alerts
                    (user_key, horizon_days, previous_probability, probability, model_version)
                SELECT s.user_key, s.horizon_days, s.probability, n.probability, %(version)s
                FROM unnest(%(keys)s::bytea[], %(probabilities)s::float8[]) AS n (user_key, probability)
                JOIN profile.churn_scores AS s ON s.user_key = n.user_key AND s.horizon_days = %(horizon)s
                WHERE floor(n.probability * 100) > floor(s.probability * 100)
                ORDER BY n.probability DESC, s.user_key
                """,
                parameters,
            )
            risen = cursor.rowcount
            connection.execute(
                """
                INSERT INTO profile.churn_scores (user_key, horizon_days, probability)
                SELECT user_key, %(horizon)s, probability
                FROM unnest(%(keys)s::bytea[], %(probabilities)s::float8[]) AS n (user_key, probability)
                ON CONFLICT (user_key, horizon_days) DO UPDATE SET probability = excluded.probability
                WHERE floor(churn_scores.probability * 100) <> floor(excluded.probability * 100)
                """,
                parameters,
            )
            connection.execute(
                "DELETE FROM profile.churn_alerts WHERE alert_time < now() - make_interval(days => %s)",
                (KEPT_DAYS,),
            )
        return risen

    def after(
        self, alert_id: int, horizon_days: int, threshold: float, limit: int
    ) -> tuple[int, list[StoredAlert]]:
        """See `ports.ChurnAlerts`."""
        with self._database.connect() as connection:
            newest = connection.execute(
                "SELECT coalesce(max(alert_id), 0) FROM profile.churn_alerts"
            ).fetchone()
            assert newest is not None
            rows = connection.execute(
                """
                SELECT alert_id, user_key, previous_probability, probability, model_version,
                    (extract(epoch FROM alert_time) * 1000000)::bigint
                FROM profile.churn_alerts
                WHERE alert_id > %s AND alert_id <= %s AND horizon_days = %s
                    AND previous_probability < %s AND probability >= %s
                ORDER BY alert_id LIMIT %s
                """,
                (alert_id, newest[0], horizon_days, threshold, threshold, limit),
            ).fetchall()
        alerts = [
            StoredAlert(number, UserKey(bytes(key)), before, now, version, time_us)
            for number, key, before, now, version, time_us in rows
        ]
        return (alerts[-1].alert_id if len(alerts) == limit else max(alert_id, newest[0])), alerts

    def newest(self) -> int:
        """See `ports.ChurnAlerts`."""
        with self._database.connect() as connection:
            row = connection.execute("SELECT coalesce(max(alert_id), 0) FROM profile.churn_alerts").fetchone()
        assert row is not None
        return int(row[0])

    def erase_forgotten(self) -> list[UserKey]:
        """See `ports.ChurnAlerts`."""
        with self._database.connect() as connection:
            return erase_forgotten(connection)
