"""Runs the migrations of the trainer schema."""

from shared.migrations_env import run

run("trainer")
