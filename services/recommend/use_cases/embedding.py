"""Shoppers as the sequence model sees them: the vector that a recommendation would begin with."""

from __future__ import annotations

from collections.abc import Sequence

from services.recommend.domain.embedding import UserEmbedding
from services.recommend.ports import Clock
from services.recommend.use_cases.histories import HistoryReader
from services.recommend.use_cases.world import Worlds
from shared.identity import UserKey


class UserEmbedder:
    """Reads histories from memory and encodes them; keeps nothing, so that nothing is left of who is erased."""

    def __init__(self, worlds: Worlds, histories: HistoryReader, clock: Clock) -> None:
        self._worlds = worlds
        self._histories = histories
        self._clock = clock

    def embed(self, user_keys: Sequence[UserKey], budget_seconds: float) -> tuple[str, list[UserEmbedding]]:
        """Returns the version in service, "" without one, and the shoppers' vectors in their order."""
        model = self._worlds.current().model
        if model is None:
            return "", [UserEmbedding(None, 0)] * len(user_keys)
        deadline = self._clock.monotonic() + budget_seconds
        embeddings = []
        for user_key in user_keys:
            history = model.read_history(self._histories.read(user_key, None, "", deadline).history)
            count = len(history)
            embeddings.append(UserEmbedding(model.encode(history) if count else None, count))
        return model.version, embeddings
