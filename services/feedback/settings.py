"""Settings of the feedback service."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from shared.settings import Address, ServiceSettings


class FeedbackSettings(ServiceSettings):
    """What can be set of the feedback service, each by SHOPKEEPER_<NAME>."""

    listen: Address = Field("127.0.0.1:7001", description="host:port on which the service answers.")
    commit_max_rows: int = Field(
        4_000, ge=1, le=100_000, description="The most events in one commit of the log."
    )
    commit_queue_rows: int = Field(
        50_000,
        ge=1_000,
        le=10_000_000,
        description="Events that may wait for their commit; beyond it calls are refused with RESOURCE_EXHAUSTED.",
    )
    commit_timeout_seconds: float = Field(
        15.0, gt=0, description="A call that has no deadline waits this long for its commit."
    )
    bot_views_per_minute: int = Field(
        120,
        ge=1,
        description="Item views of one shopper, or in one session, in one minute beyond which that minute's events are "
        "marked as a bot's.",
    )
    bot_bare_views_per_hour: int = Field(
        600,
        ge=1,
        description="Item views in one hour beyond which who does nothing else, and stays on no page, is a bot.",
    )
    bot_users_per_session: int = Field(
        8, ge=1, le=1_000, description="Shoppers in one session and hour beyond which it is a bot's."
    )
    bot_metronome_views: int = Field(
        30,
        ge=10,
        le=600,
        description="Item views in one hour from which on equal intervals between them make a bot.",
    )
    bot_check_seconds: float = Field(
        5.0, gt=0, le=3_600, description="How often new events are looked through for bots."
    )
    attribution_max_age_days: float = Field(
        30.0, gt=0, description="An attribution token older than this no longer earns credit."
    )
    notify_interval_ms: int = Field(
        20, ge=1, le=1_000, description="The least time between two wake-ups of the readers of the log."
    )
    stream_read_ahead: int = Field(
        4, ge=1, le=64, description="Batches that one stream may have on their way before it is slowed down."
    )
    import_directory: Path | None = Field(
        None, description="Directory whose files `ImportEvents` may read. Defaults to <home>/imports."
    )
    catalogue_check_seconds: float = Field(
        60.0,
        ge=0,
        le=86_400,
        description="How often the ids of profile's catalogue are read, to say which events name unknown items; 0: never.",
    )
    retention_days: int = Field(
        0,
        ge=0,
        le=36_525,
        description="Months of the log that lie wholly before so many days are dropped; 0 keeps them for ever.",
    )
    experiment_check_seconds: float = Field(
        60.0,
        gt=0,
        le=86_400,
        description="How often running experiments are checked for broken guard rails and a broken split.",
    )

    @property
    def import_path(self) -> Path:
        """The directory of files to import."""
        return self.import_directory or self.home / "imports"
