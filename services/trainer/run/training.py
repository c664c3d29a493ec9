"""A training run: from the log to a published version."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.trainer.domain.privacy import DifferentialPrivacy, GaussianRelease, PrivacyCharge
from services.trainer.domain.runs import TrainingRun
from services.trainer.pipeline.pipeline import train_model
from services.trainer.pipeline.plan import TrainedModel
from services.trainer.pipeline.warm_start import InitialWeights, read_weights
from services.trainer.privacy.accounting import epsilon_of_ledger
from services.trainer.privacy.ledger import PostgresPrivacyLedger
from services.trainer.privacy.training import PrivateModel, train_privately
from services.trainer.run.heart import Heart
from services.trainer.run.second_stage import add_second_stage, say_why_none
from services.trainer.run.work import Work, code_version, plan_of
from services.trainer.storage import PublishingLease
from shared.bundle import Bundle, Registry, load_bundle, write_bundle
from shared.errors import Aborted, Cancelled, DataLoss
from shared.keys import read_signing_key

_LEASE_PATIENCE_SECONDS = 20.0


def train(work: Work) -> None:
    """Does the run's work, to the published version.

    Raises:
        ShopkeeperError: with a reason of the contract; nothing is published.
    """
    run, settings = work.run, work.settings
    size, plan = plan_of(run.config)
    signing_key = read_signing_key(settings.keys_path)
    lease = PublishingLease(work.database, run.model)
    event_log = work.event_log()
    try:
        _acquire(lease, run, work.heart)
        registry = Registry(settings.registry_path)
        registry.raise_fence(run.model, lease.fence)
        events = work.read_log()
        catalogue = work.read_catalogue(events)
        attributes = catalogue.attributes
        known = (
            f"no catalogue: {catalogue.why_none}"
            if catalogue.why_none
            else f"{len(attributes):,} items in the catalogue"
        )
        served, incumbent = version_in_service(registry, work, signing_key.public_key())
        trained: TrainedModel | PrivateModel
        if run.config.differential_privacy is not None:
            # What a private run finds in the log, such as how much there is, is nobody's to read.
            work.report("READING", f"{known[0].upper()}{known[1:]}.")
            trained = train_privately(
                events,
                attributes,
                run.config.differential_privacy,
                plan,
                model_name=run.model,
                report=work.report,
                charge=charger_of(work, run.config.differential_privacy),
                should_stop=work.heart.should_stop,
                code_version=code_version(),
            )
            say_why_none(trained)
        else:
            content, of_content = work.read_item_vectors()
            work.report(
                "READING", f"{len(events):,} events of {len(events.item_ids):,} items; {known}{of_content}."
            )
            trained = train_model(
                events,
                attributes,
                size,
                plan,
                content=content,
                model_name=run.model,
                seed=run.config.seed,
                report=work.report,
                should_stop=work.heart.should_stop,
                code_version=code_version(),
                incumbent=incumbent,
                initial=initial_weights(registry, work, signing_key.public_key()),
                checkpoints=work.checkpoints(),
                scalars=event_log.scalars,
            )
            if catalogue.digest:
                trained.manifest_fields["data"]["catalogue"] = catalogue.digest
            add_second_stage(work, registry, trained, events, attributes, plan, signing_key.public_key())
            event_log.outcome(trained.manifest_fields, trained.attachments)
        work.report("PUBLISHING", f"Publishing; the gate says {trained.verdict.verdict}.")
        version = lease.publish(
            run.run_id,
            run.attempt,
            lambda: _publish(registry, run, trained, served, lease.fence, signing_key, work.logger),
        )
        if version is None:
            raise Cancelled("CANCELLED", "The run was cancelled before its version was published.")
    finally:
        event_log.close()
        lease.close()


def charger_of(work: Work, private: DifferentialPrivacy) -> Callable[[Sequence[GaussianRelease]], None]:
    """Returns what charges this attempt of a run to the budget; one that is started anew pays anew."""
    run, settings = work.run, work.settings
    ledger = PostgresPrivacyLedger(
        work.database, settings.privacy_epsilon_limit, settings.privacy_delta, epsilon_of_ledger
    )

    def charge(releases: Sequence[GaussianRelease]) -> None:
        ledger.charge(
            PrivacyCharge(
                run.run_id,
                run.attempt,
                run.model,
                private.epsilon,
                private.delta,
                private.mechanism,
                tuple(releases),
            )
        )

    return charge


def _acquire(lease: PublishingLease, run: TrainingRun, heart: Heart) -> None:
    deadline = time.monotonic() + _LEASE_PATIENCE_SECONDS
    while not lease.try_acquire():
        if time.monotonic() > deadline or heart.should_stop():
            raise Aborted(
                "LEASE_LOST",
                f"Another process holds the publishing lease of model {run.model}; start the run again when it is done.",
                {"model": run.model},
            )
        time.sleep(0.2)


def version_in_service(
    registry: Registry, work: Work, public_key: Ed25519PublicKey
) -> tuple[str, Bundle | None]:
    """Returns where the alias points that the run would change (empty: nowhere), and what the new one must beat.

    A version that no longer loads is no reason to keep its successor back.
    """
    run = work.run
    alias = registry.alias(run.model, run.config.promote_alias)
    if alias is None:
        return "", None
    try:
        return alias.version, load_bundle(registry.version_path(run.model, alias.version), public_key)
    except DataLoss as error:
        work.report("READING", f"The version in service is not compared with: {error.message}")
        return alias.version, None


def initial_weights(registry: Registry, work: Work, public_key: Ed25519PublicKey) -> InitialWeights | None:
    """Returns the weights that the run begins with; None where it begins at random.

    Raises:
        FailedPrecondition: INITIAL_VERSION_UNFIT.
        DataLoss, NotFound: the version is damaged or gone.
    """
    run = work.run
    if not run.config.initial_version:
        return None
    alias = registry.alias(run.model, run.config.initial_version)
    version = alias.version if alias is not None else run.config.initial_version
    directory = registry.version_path(run.model, version)
    # Loading verifies every file.
    bundle = load_bundle(directory, public_key)
    return read_weights(directory, version, list(bundle.item_ids), bundle.manifest)


def _publish(
    registry: Registry,
    run: TrainingRun,
    trained: TrainedModel | PrivateModel,
    served: str,
    fence: int,
    signing_key: Any,
    logger: Any,
) -> tuple[str, dict[str, Any], str | None]:
    version = write_bundle(
        registry,
        run.model,
        arrays=trained.arrays,
        vocabulary=trained.vocabulary,
        encoder_bytes=trained.encoder_bytes,
        # Receipts of erasure are read off these: when the reading of the log was asked for, and what it saw.
        manifest_fields={
            **trained.manifest_fields,
            "run_id": run.run_id,
            "requested_at": run.created_at.astimezone(UTC).isoformat(),
        },
        attachments=trained.attachments,
        signing_key=signing_key,
        fence=fence,
    )
    why_not = _promote(registry, run, trained, version, served, fence, logger)
    return version, trained.manifest_fields["gate"], why_not


def _promote(
    registry: Registry,
    run: TrainingRun,
    trained: TrainedModel | PrivateModel,
    version: str,
    served: str,
    fence: int,
    logger: Any,
) -> str | None:
    """Points the alias where the gate and the run allow it; returns why not, or None where it did."""
    if not run.config.promote:
        return "the run was told not to promote"
    if not trained.verdict.may_serve:
        return "the gate failed it"
    cause = "GATE_PASSED" if trained.verdict.verdict == "PASSED" else "FORCED"
    try:
        # The verdict is about the version that served when the run began, and holds for no other.
        registry.set_alias(
            run.model, run.config.promote_alias, version, reason=cause, comment=f"run {run.run_id}",
            expected_current=served, fence=fence,
        )  # fmt: skip
    except Aborted as error:
        return f"another version was promoted during the run. {error.message}"
    except OSError as error:
        # The version stands; an operator can promote it when the disk is mended.
        logger.error("alias not changed", alias=run.config.promote_alias, error=str(error))
        return f"the alias could not be written ({error.strerror})"
    return None
