"""Segments: groups of shoppers by a saved, versioned filter."""

from __future__ import annotations

import re
from dataclasses import dataclass

SEGMENT_ID = re.compile(r"^[a-z0-9][a-z0-9_-]{0,62}$")
MAX_DISPLAY_NAME = 200
MAX_DESCRIPTION = 2_000


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment as stored.

    Attributes:
        filter: text of the expression.
        version: counts changes of the filter, from 1.
        revision: counts changes of anything, from 1.
        create_us, update_us: microseconds since 1970.
    """

    segment_id: str
    display_name: str
    description: str
    filter: str
    version: int = 0
    revision: int = 0
    create_us: int = 0
    update_us: int = 0


@dataclass(frozen=True, slots=True)
class SegmentChange:
    """New values of a segment; None leaves a field as it is.

    Attributes:
        revision: the write fails unless it is the current one; None does not check.
    """

    segment_id: str
    display_name: str | None = None
    description: str | None = None
    filter: str | None = None
    revision: int | None = None
