"""A shopper as one vector."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class UserEmbedding:
    """A query vector, (D,), and the events that it was made of; None where the model knows none of them."""

    query_D: npt.NDArray[np.float32] | None
    event_count: int
