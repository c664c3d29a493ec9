"""PostgreSQL: the log as feedback publishes it, and the catalogue."""
