"""What is in service, how fresh it is, and what answers go without at present."""

from __future__ import annotations

from services.recommend.domain.recommendation import Cause, Degradation
from services.recommend.domain.status import ServiceStatus, StreamState
from services.recommend.ports import CatalogStream, Clock, LiveProfiles, Models
from services.recommend.use_cases.histories import STALE_AFTER_SECONDS


class StatusReader:
    """Reads the state of everything that an answer depends on."""

    def __init__(self, models: Models, profiles: LiveProfiles, catalog: CatalogStream, clock: Clock) -> None:
        self._models = models
        self._profiles = profiles
        self._catalog = catalog
        self._clock = clock
        self._start_time = clock.now()

    def read(self) -> ServiceStatus:
        """Returns the state as of now."""
        models, profiles, catalog = self._models.states(), self._profiles.state(), self._catalog.state()
        degraded = [
            Degradation(Cause.NO_MODEL, f"alias {model.alias} has no version in service")
            for model in models
            if not model.version
        ]
        if self._is_stale(profiles):
            degraded.append(Degradation(Cause.PROFILE_STALE, profiles.last_error or "no heartbeat"))
        if not catalog.complete:
            degraded.append(Degradation(Cause.CATALOG_UNAVAILABLE, catalog.last_error or "not arrived yet"))
        elif not catalog.connected:
            degraded.append(Degradation(Cause.CATALOG_STALE, catalog.last_error))
        return ServiceStatus(models, (profiles, catalog), degraded, self._start_time)

    def _is_stale(self, state: StreamState) -> bool:
        heard = state.last_message_time
        return not state.connected or heard is None or self._clock.now() - heard > STALE_AFTER_SECONDS
