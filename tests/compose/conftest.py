"""The suite in real containers: `make test-compose`."""

from __future__ import annotations

# Runs inside of a container, without anything of this repository but the stubs.
collect_ignore = ["runner"]
