"""Typed settings from the environment. Every problem is reported at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AliasChoices, Field, StringConstraints, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX = "SHOPKEEPER_"
SECRETS_VARIABLE = "SHOPKEEPER_SECRETS"

Address = Annotated[str, StringConstraints(pattern=r"^.+:[0-9]{1,5}$")]
SettingsT = TypeVar("SettingsT", bound="ServiceSettings")

EXIT_USAGE = 2


class ServiceSettings(BaseSettings):
    """What every service can be told. A service adds its own in its `settings.py`.

    Names are prefixed with SHOPKEEPER_, but for those that the field knows by another name.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="ignore", frozen=True
    )

    home: Path = Field(
        Path(".shopkeeper"), description="Directory of everything that is not configured elsewhere."
    )
    listen: Address = Field(
        "127.0.0.1:0", description="host:port on which the service answers; port 0 picks one."
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of Prometheus metrics on the same host; 0 turns it off."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe line that is logged."
    )
    log_format: Literal["json", "console"] = Field(
        "json", description="json for machines, console for people."
    )
    database_url: str | None = Field(
        None,
        validation_alias=AliasChoices("database_url", "DATABASE_URL"),
        description="PostgreSQL 16 or later, postgresql://user:password@host:port/database. Unset: an embedded one in `home`.",
    )
    auto_migrate: bool = Field(
        True, description="Migrate the own schema at start. Turn it off where a migration job does it."
    )
    registry: Path | None = Field(None, description="Model registry directory. Defaults to <home>/registry.")
    keys: Path | None = Field(None, description="Key directory, see shared/keys.py. Defaults to <home>/keys.")
    feedback_address: Address = Field("127.0.0.1:7001", description="Where the others find feedback.")
    profile_address: Address = Field("127.0.0.1:7002", description="Where the others find profile.")
    trainer_address: Address = Field("127.0.0.1:7003", description="Where the others find trainer.")
    recommend_address: Address = Field("127.0.0.1:7004", description="Where the others find recommend.")
    workers: int = Field(32, ge=2, le=1024, description="Threads that answer calls. A stream occupies one.")
    max_queue_seconds: float = Field(
        0.25,
        gt=0,
        le=60,
        description="A call that would wait longer than this for a thread, by the speed measured, is refused with "
        "RESOURCE_EXHAUSTED and a time to retry. A quarter of it for what can wait.",
    )
    drain_seconds: float = Field(
        10.0, ge=0, description="After SIGTERM: the longest wait for calls under way."
    )
    max_stream_age_seconds: float = Field(
        1800.0, gt=0, description="A stream older than this is ended; clients reconnect."
    )
    tls: Path | None = Field(
        None,
        description="Directory with tls.crt, tls.key and ca.crt for mutual TLS 1.3; read again when they change.",
    )
    insecure: bool = Field(
        False,
        validation_alias=AliasChoices("insecure", "INSECURE", "SHOPKEEPER_INSECURE"),
        description="Plain text and no authorisation; refused on any address but loopback.",
    )
    policy: Path | None = Field(
        None,
        description="File that says which identity may call which RPC, see docs/security.md. Needed with `tls`.",
    )
    token_keys: Path | None = Field(
        None,
        description="JSON Web Key Set of the issuer whose tokens name callers. Unset: certificates alone do.",
    )
    token_issuer: str = Field(
        "https://kubernetes.default.svc.cluster.local", description="The `iss` of those tokens."
    )
    token_audience: str = Field("shopkeeper", description="The `aud` that they must be bound to.")
    token_listen: Address | None = Field(
        None,
        description="Second host:port, TLS without a client certificate, for callers that bring a token.",
    )
    health_listen: Address | None = Field(
        None,
        description="Third host:port, plain text, that answers health checks and nothing else: probes of "
        "Kubernetes show no certificate.",
    )
    otlp_endpoint: str | None = Field(
        None,
        validation_alias=AliasChoices("otlp_endpoint", "OTEL_EXPORTER_OTLP_ENDPOINT"),
        description="OpenTelemetry collector (gRPC) that takes traces. Unset: traces are not exported.",
    )

    model_retention_days: int = Field(
        180,
        ge=0,
        le=36_525,
        description="Model versions that no alias names are removed when so many days old; 0 keeps them for ever. "
        "Give feedback and trainer the same: an erasure receipt says when the versions that hold the person go.",
    )

    @property
    def registry_path(self) -> Path:
        """The model registry."""
        return self.registry or self.home / "registry"

    @property
    def keys_path(self) -> Path:
        """The key directory."""
        return self.keys or self.home / "keys"


def load_settings(cls: type[SettingsT]) -> SettingsT:
    """Returns the settings from the environment, or ends the process with one line a problem (exit code 2).

    SHOPKEEPER_SECRETS names a directory of files, each called as a variable would be, for what should not stand in
    an environment: `DATABASE_URL` above all. A variable goes before a file.
    """
    secrets = os.environ.get(SECRETS_VARIABLE) or None
    try:
        return cls(_secrets_dir=secrets)
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else "settings"
            variable = name if name.isupper() else ENV_PREFIX + name.upper()
            print(f"{variable}: {problem['msg']} (got {problem['input']!r})", file=sys.stderr)
        raise SystemExit(EXIT_USAGE) from None
