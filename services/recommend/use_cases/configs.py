"""The serving configs that there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from services.recommend.domain.serving_config import BUILT_IN, ServingConfig
from shared.errors import NotFound


class ServingConfigs:
    """Finds serving configs by id."""

    def __init__(self, configs: Mapping[str, ServingConfig] = BUILT_IN) -> None:
        self._configs = configs

    def get(self, serving_config_id: str) -> ServingConfig:
        """Returns a serving config.

        Raises:
            NotFound: SERVING_CONFIG_NOT_FOUND.
        """
        config = self._configs.get(serving_config_id)
        if config is None:
            raise NotFound(
                "SERVING_CONFIG_NOT_FOUND",
                f"No serving config {serving_config_id}; ListServingConfigs names those there are.",
                {"servingConfigId": serving_config_id},
            )
        return config

    def list(self, limit: int, after: str) -> tuple[Sequence[ServingConfig], str]:
        """Returns the configs after an id, by id, and the id after which the next page begins, or ""."""
        ids = [config_id for config_id in sorted(self._configs) if config_id > after]
        page = [self._configs[config_id] for config_id in ids[:limit]]
        return page, page[-1].serving_config_id if len(ids) > limit else ""
