"""The ports over PostgreSQL: SQLAlchemy Core for ordinary queries, binary arrays for the log."""
