"""Runs the migrations of the feedback schema."""

from shared.migrations_env import run

run("feedback")
