"""Tests. The environment is set before anything is imported: services speak plain text on loopback."""

import os

# Before grpc is imported: see there.
import shared  # noqa: F401

os.environ.setdefault("INSECURE", "1")
