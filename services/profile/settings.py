"""What the profile service can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from shared.settings import Address, ServiceSettings


class ProfileSettings(ServiceSettings):
    """Settings of the profile service, beside those of every service."""

    listen: Address = Field("127.0.0.1:7002", description="host:port on which the service answers.")
    hot_users: int = Field(
        100_000,
        ge=1,
        description="Most shoppers kept in memory: some 0.5 KB each, and 25 bytes for each of their events.",
    )
    pool_size: int = Field(8, ge=3, le=256, description="Most connections to the database, listeners aside.")
    catch_up_seconds: float = Field(
        5.0, gt=0, description="Longest wait for the log where a consistency token comes without a deadline."
    )
    churn_score_seconds: float = Field(
        300.0, gt=0, description="How often the risk of every shopper is computed anew."
    )
    import_directory: Path | None = Field(
        None, description="Directory whose files `ImportItems` may read. Defaults to <home>/imports."
    )
    item_portrait_seconds: float = Field(
        300.0,
        gt=0,
        description="Portraits of items are made anew, of all of them together, when asked for and older than this.",
    )
    population_seconds: float = Field(
        300.0, gt=0, description="How often the fifths of all shoppers are computed anew."
    )
    segment_seconds: float = Field(
        5.0, gt=0, description="How often segments are read anew, for what live profiles tell of them."
    )
    margin_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="The share of an order's worth that is margin, for lifetime values. At 1 they are revenue.",
    )

    text_encoder: Literal["ngrams", "e5"] = Field(
        "ngrams",
        description="What reads texts of items: character n-grams alone, or multilingual-e5-small beside them, some 20 ms a text in the background.",
    )
    image_encoder: Literal["none", "efficientnet-lite0"] = Field(
        "none", description="What looks at pictures of items, some 50 ms a picture in the background."
    )

    @property
    def import_path(self) -> Path:
        """The directory of files to import."""
        return self.import_directory or self.home / "imports"
