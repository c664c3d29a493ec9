"""What the recommend service can be told, from the environment."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from shared.settings import Address, ServiceSettings


class RecommendSettings(ServiceSettings):
    """Settings of the recommend service, beyond those of every service."""

    listen: Address = Field("127.0.0.1:7004", description="host:port on which the service answers.")
    recommend_model: str = Field("main", description="Name of the model in the registry.")
    recommend_alias: str = Field("production", description="Registry alias whose version serves.")
    registry_poll_seconds: float = Field(
        0.2, gt=0, le=60, description="How often the alias is looked at; a rollback takes effect within it."
    )
    recommend_configuration: Path | None = Field(
        None,
        description="Directory of serving configs and rules, one for all replicas; default: `configuration` "
        "beside the registry.",
    )
    configuration_poll_seconds: float = Field(
        0.2, gt=0, le=60, description="How often that directory is looked at for changes of other replicas."
    )
    answer_budget_seconds: float = Field(
        1.0, gt=0, le=30, description="The longest that an answer takes where the caller's deadline is later."
    )
    profile_partition_index: int = Field(0, ge=0, description="Partition of shoppers held by this replica.")
    profile_partition_count: int = Field(
        1, ge=1, le=4096, description="Partitions of shoppers; 1: every replica holds all."
    )
    max_profiles: int = Field(200_000, ge=1, description="Live histories held in memory (some 5 kB each).")
    recorded_requests: int = Field(
        2_000, ge=1, le=100_000, description="Newest requests kept in memory for rehearsals of rules."
    )
    max_items: int = Field(5_000_000, ge=1, description="Item ids, known from events, that are kept apart.")
    catalog_grace_seconds: float = Field(
        5.0, ge=0, description="At start: the longest wait for the catalogue before calls are accepted."
    )

    experiment_poll_seconds: float = Field(
        5.0, gt=0, le=3600, description="How often feedback is asked which experiments run."
    )
    exact_search_items: int = Field(
        50_000,
        ge=0,
        description="Items of a model up to which each is scored; larger ones are searched with faiss.",
    )
    content_vector_items: int = Field(
        50_000,
        ge=0,
        description="Items up to which their content vectors are held, some 1.5 kB each; 0: none.",
    )
    computing_threads: int = Field(
        0,
        ge=0,
        le=64,
        description="Answers computed at once; 0: one, or two where the catalogue is searched. More only wait for "
        "the interpreter, and for each other.",
    )
    shared_port: bool = Field(
        False, description="Let several processes listen on the one port; the kernel divides the connections."
    )

    @property
    def configuration_path(self) -> Path:
        """The directory of serving configs and rules."""
        return self.recommend_configuration or self.registry_path.parent / "configuration"

    @model_validator(mode="after")
    def _partition_exists(self) -> RecommendSettings:
        if self.profile_partition_index >= self.profile_partition_count:
            raise ValueError("profile_partition_index must be below profile_partition_count")
        return self
