"""Marks bots in the log, by counts that are a function of the log.

One replica does it for all. The counts and how far they go are committed in one transaction, so a crash loses
nothing and counts nothing twice; whichever replicas took the events in, the marks are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from services.feedback.domain.bots import BotRules, is_metronome
from services.feedback.storage.log_pages import PAGE_ROWS, LogPage, next_page, unhurried
from services.feedback.storage.partitions import WRITERS_LOCK
from shared.database import Database
from shared.event_kinds import EventKind
from shared.telemetry import get_logger

# A window that nothing came to for so long is forgotten; what comes later is counted anew.
_KEPT_DAYS = 2
_TIDY_SECONDS = 3_600.0
# Of an hour, the earliest; by then a machine is known.
MOMENTS = 600
_ITEM_VIEW = int(EventKind.ITEM_VIEW)
_MOST_PAGE_ROWS = 100_000

_COUNT = """
WITH fresh AS (
    SELECT user_key, session_key, occurred_at, key_version, kind = %(view)s AS is_view,
        kind <> %(view)s OR COALESCE(value, 0) > 0 AS is_human,
        (extract(epoch FROM occurred_at - date_bin('1 hour', occurred_at, '2000-01-01Z'::timestamptz)) * 1000)::integer
            AS moment
    FROM feedback.events
    WHERE xid >= %(after)s::xid8 AND xid < %(before)s::xid8 AND quarantine_reason IS NULL
), subjects AS (
    SELECT user_key AS subject_key, false AS is_session, * FROM fresh
    UNION ALL
    SELECT session_key, true, * FROM fresh WHERE session_key IS NOT NULL
), counted AS (
    SELECT s.subject_key, s.is_session, w.seconds,
        date_bin(make_interval(secs => w.seconds), s.occurred_at, '2000-01-01Z'::timestamptz) AS starts_at,
        s.key_version, count(*) FILTER (WHERE s.is_view) AS views, count(*) FILTER (WHERE s.is_human) AS human_events,
        (array_agg(DISTINCT s.user_key))[1:%(users)s + 1] AS user_keys,
        -- The earliest are the same whatever comes first.
        COALESCE((array_agg(DISTINCT s.moment ORDER BY s.moment) FILTER (WHERE s.is_view AND w.seconds = 3600))
            [1:%(moments)s], '{}') AS moments
    FROM subjects AS s CROSS JOIN (VALUES (60::smallint), (3600::smallint)) AS w (seconds)
    WHERE w.seconds = 3600 OR s.is_view
    GROUP BY 1, 2, 3, 4, 5
), windows AS (
    INSERT INTO feedback.bot_windows AS b
        (subject_key, is_session, starts_at, seconds, key_version, views, human_events, user_keys, moments)
    SELECT subject_key, is_session, starts_at, seconds, key_version, views, human_events, user_keys, moments FROM counted
    ORDER BY subject_key, starts_at, seconds
    ON CONFLICT (subject_key, starts_at, seconds, is_session, key_version) DO UPDATE SET
        views = b.views + excluded.views,
        human_events = b.human_events + excluded.human_events,
        user_keys = (ARRAY(SELECT DISTINCT unnest(b.user_keys || excluded.user_keys)))[1:%(users)s + 1],
        moments = CASE WHEN b.seconds = 3600 THEN
            (ARRAY(SELECT DISTINCT m FROM unnest(b.moments || excluded.moments) AS m ORDER BY m))[1:%(moments)s] ELSE '{}' END,
        counted_at = now()
    RETURNING subject_key, is_session, starts_at, seconds, user_keys,
        (seconds = 60 AND views > %(rate)s)
        OR (seconds = 3600 AND human_events = 0 AND views > %(bare)s)
        OR (seconds = 3600 AND is_session AND cardinality(user_keys) > %(users)s) AS beyond,
        CASE WHEN cardinality(moments) >= %(metronome)s THEN moments END AS moments
)
-- The others, nearly all, stay where they are: to make objects of them holds up the calls that are served beside.
SELECT * FROM windows WHERE beyond OR moments IS NOT NULL
"""
# By the index of shoppers: a session's rows are found through whose they are. Those of shoppers beyond the list came
# after the session was over its limit, and are in the page just counted. A shopper's rows are read once, not once a
# window: one who sends millions has thousands of windows.
_MARK = """
WITH beyond AS MATERIALIZED (
    SELECT * FROM unnest(%(subjects)s::bytea[], %(sessions)s::boolean[], %(starts)s::timestamptz[],
        %(seconds)s::smallint[]) AS u (subject_key, is_session, starts_at, seconds)
), of_shoppers AS MATERIALIZED (
    SELECT b.*, k.user_key FROM beyond AS b
    JOIN feedback.bot_windows AS w USING (subject_key, is_session, starts_at, seconds)
    CROSS JOIN LATERAL unnest(w.user_keys) AS k (user_key)
), theirs AS MATERIALIZED (
    SELECT e.event_key, e.user_key, e.session_key, e.occurred_at
    FROM (SELECT DISTINCT user_key FROM of_shoppers) AS s JOIN feedback.events AS e USING (user_key)
    WHERE NOT e.is_bot AND e.occurred_at >= (SELECT min(starts_at) FROM beyond)
        AND e.occurred_at < (SELECT max(starts_at) + interval '1 hour' FROM beyond)
), doomed AS (
    SELECT t.event_key FROM theirs AS t CROSS JOIN (VALUES (60::smallint), (3600::smallint)) AS w (seconds)
    JOIN of_shoppers AS b ON b.user_key = t.user_key AND b.seconds = w.seconds
        AND b.starts_at = date_bin(make_interval(secs => w.seconds), t.occurred_at, '2000-01-01Z'::timestamptz)
        AND (NOT b.is_session OR t.session_key = b.subject_key)
    UNION
    SELECT e.event_key FROM feedback.events AS e
    JOIN beyond AS b ON b.is_session AND e.session_key = b.subject_key
        AND e.occurred_at >= b.starts_at AND e.occurred_at < b.starts_at + make_interval(secs => b.seconds)
    WHERE e.xid >= %(after)s::xid8 AND e.xid < %(before)s::xid8
)
UPDATE feedback.events AS e SET is_bot = true FROM doomed AS d WHERE e.event_key = d.event_key AND NOT e.is_bot
"""


class BotMarks:
    """The work of marking, a page of the log at a time."""

    def __init__(
        self,
        database: Database,
        rules: BotRules,
        *,
        page_rows: int = PAGE_ROWS,
        wait: Callable[[float], object] = lambda seconds: None,
    ) -> None:
        self._wait = wait
        self._tidy_at = 0.0
        self._database = database
        self._rules = rules
        self._page_rows = self._next_page_rows = page_rows
        self._logger = get_logger("feedback")

    def step(self) -> bool:
        """Counts the next page and marks what is beyond a limit; returns whether there is another page."""
        with unhurried(self._wait):
            page, beyond, marked = self._look_through()
            if page.is_last and time.monotonic() >= self._tidy_at:
                self._tidy()
            if marked:
                self._logger.info("events marked as a bot's", events=marked, windows=beyond)
        # Marking reads what a shopper ever did, once a page: who lags behind a bot takes larger ones.
        if page.is_last:
            self._next_page_rows = self._page_rows
        elif beyond:
            self._next_page_rows = max(self._page_rows, min(2 * self._next_page_rows, _MOST_PAGE_ROWS))
        return not page.is_last

    def _look_through(self) -> tuple[LogPage, int, int]:
        """Counts the next page and marks; returns it, how many windows are beyond a limit, and how many events were marked."""
        rules = self._rules
        with self._database.connect() as connection:
            connection.execute("SET LOCAL statement_timeout = 0")
            # As a writer of the log does: an erasure under way waits for this, or this sees its result.
            connection.execute("SELECT pg_advisory_xact_lock_shared(%s)", (WRITERS_LOCK,))
            page = next_page(connection, "bot_watermark", self._next_page_rows)
            if page.is_empty:
                return page, 0, 0
            counted = connection.execute(
                _COUNT,
                {
                    **page.bounds, "view": _ITEM_VIEW, "rate": rules.views_per_minute,
                    "bare": rules.bare_views_per_hour, "users": rules.users_per_session,
                    "metronome": rules.metronome_views, "moments": MOMENTS,
                },
            ).fetchall()  # fmt: skip
            beyond = [
                row for row in counted
                if row[5] or (row[6] is not None and is_metronome(row[6], rules.metronome_views))
            ]  # fmt: skip
            marked = 0
            if beyond:
                subjects, sessions, starts, seconds = ([row[column] for row in beyond] for column in range(4))
                marked = connection.execute(
                    _MARK,
                    {
                        **page.bounds, "subjects": subjects, "sessions": sessions, "starts": starts, "seconds": seconds,
                    },
                ).rowcount  # fmt: skip
            connection.execute("UPDATE feedback.bot_watermark SET xid = %s::xid8", (page.before,))
        return page, len(beyond), marked

    def _tidy(self) -> None:
        with self._database.connect() as connection:
            connection.execute(
                "DELETE FROM feedback.bot_windows WHERE counted_at < now() - make_interval(days => %s)",
                (_KEPT_DAYS,),
            )
        self._tidy_at = time.monotonic() + _TIDY_SECONDS
