"""Windows as bytes: what a shopper in memory costs.

A column holds bytes of one kind, so its bytes are turned by 90 degrees before they are deflated: the high
bytes of times, prices and codes hardly differ. What remains of an event are the random bits of its key.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from services.profile.domain.events import EVENT, Events

# Level 1 packs as well as 6 here, in half the time.
_LEVEL = 1
_COUNT_BYTES = 2


def pack(events_W: Events) -> bytes:
    """Returns the events of a window, W < 65,536, in some 20 bytes each; `unpack` gives them back to the bit."""
    if not len(events_W):
        return b""
    count = len(events_W)
    events_W = events_W.copy()
    # A key begins with the milliseconds of its event: what is left of the time is mostly nothing.
    events_W["occurred_at_us"] -= _time_us_of_key(events_W)
    turned = events_W.view(np.uint8).reshape(count, EVENT.itemsize).T
    return count.to_bytes(_COUNT_BYTES, "big") + zlib.compress(turned.tobytes(), _LEVEL)


def unpack(packed: bytes) -> Events:
    """Returns the events of `pack`, EVENT, (W,)."""
    if not packed:
        return np.empty(0, EVENT)
    count = int.from_bytes(packed[:_COUNT_BYTES], "big")
    turned = np.frombuffer(zlib.decompress(packed[_COUNT_BYTES:]), np.uint8).reshape(EVENT.itemsize, count)
    # A copy even of one event, whose turned bytes need none: what inflates to bytes cannot be written to.
    events_W = np.array(turned.T, order="C", copy=True).view(EVENT).reshape(count)
    events_W["occurred_at_us"] += _time_us_of_key(events_W)
    return events_W


def _time_us_of_key(events_W: Events) -> npt.NDArray[np.int64]:
    return (events_W["key_high"] >> np.uint64(16)).astype(np.int64) * 1000
