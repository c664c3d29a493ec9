"""Settings of the trainer service."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from shared.settings import Address, ServiceSettings


class TrainerSettings(ServiceSettings):
    """What can be set of the trainer service, each by SHOPKEEPER_<NAME>."""

    listen: Address = Field("127.0.0.1:7003", description="host:port on which the service answers.")
    max_concurrent_runs: int = Field(
        1,
        ge=1,
        le=64,
        description="Runs that work at once, of different models. Each takes every core it finds.",
    )
    max_queued_runs: int = Field(
        100, ge=1, description="Runs that may wait; more are refused with RESOURCE_EXHAUSTED."
    )
    max_run_attempts: int = Field(
        3, ge=1, description="How often a run is started anew when the trainer, not the run, was stopped."
    )
    run_memory_bytes: int = Field(
        0, ge=0, description="Address space of a run's process beyond which it fails; 0 sets no limit."
    )
    run_silence_seconds: float = Field(
        20.0,
        gt=0,
        description="A run of a trainer that is gone counts as dead after so long without a heartbeat.",
    )
    cancel_grace_seconds: float = Field(
        5.0, ge=0, description="A cancelled run has so long to stop by itself before it is killed."
    )
    privacy_epsilon_limit: float = Field(
        10.0,
        gt=0,
        le=1000,
        description="The most epsilon that the private runs of all models may spend together in any 365 days.",
    )
    privacy_delta: float = Field(
        1e-5, gt=0, le=1e-3, description="Delta at which that limit holds; choose it below 1 / people."
    )
    privacy_required: bool = Field(False, description="Refuses training runs without differential privacy.")
    catalogue_timeout_seconds: float = Field(
        10.0,
        gt=0,
        description="A run waits so long for a page of the catalogue, then trains without attributes.",
    )
    item_vectors_path: Path | None = Field(
        None,
        description="Vectors of items' text or pictures (`.npz`); runs that cannot read them train without.",
    )
    drift_check_seconds: float = Field(
        300.0, gt=0, description="How often a schedule that trains on drift is measured."
    )
    snapshots: bool = Field(
        True,
        description="Keeps the log's events as day files under the home, so that a run reads only what is new.",
    )
    snapshot_retention_days: int = Field(
        30,
        ge=0,
        description="A set of day files that was replaced is kept so long, so that its runs can be repeated.",
    )
    snapshot_upkeep_seconds: float = Field(
        3600.0,
        gt=0,
        description="How often who was erased or withdrew consent is taken out of the day files, run or no run.",
    )


def directory_of(home: Path, run_id: str) -> Path:
    """Returns the directory of a run's own files: its log, its checkpoint, its curves."""
    return home.resolve() / "runs" / run_id


def catalogues_of(home: Path) -> Path:
    """Returns the directory of catalogues as runs read them."""
    return home.resolve() / "catalogues"


def snapshots_of(home: Path) -> Path:
    """Returns the directory of the log's day files."""
    return home.resolve() / "snapshots"
