"""Differential privacy: what is asked for, what is promised, what was spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shopkeeper.trainer.v1 import model_pb2, privacy_budget_pb2, training_run_pb2

from services.trainer.converters.checks import Violations
from services.trainer.converters.times import timestamp
from services.trainer.domain.privacy import (
    COUNTS,
    DEFAULT_DELTA,
    GRADIENTS,
    MAX_CLIP_NORM,
    MAX_DELTA,
    MAX_EPSILON,
    DifferentialPrivacy,
    PrivacyBudget,
)

_FIELD = "config.differential_privacy"


def privacy_from_proto(
    config: training_run_pb2.TrainingConfig, violations: Violations
) -> DifferentialPrivacy | None:
    """Returns what a configuration promises, or None; notes what is wrong with it."""
    if not config.HasField("differential_privacy"):
        return None
    message = config.differential_privacy
    violations.check(
        0 < message.epsilon <= MAX_EPSILON,
        f"{_FIELD}.epsilon",
        f"must be above 0 and at most {MAX_EPSILON:g}.",
    )
    violations.check(
        message.delta == 0 or 0 < message.delta <= MAX_DELTA,
        f"{_FIELD}.delta",
        f"must be above 0 and at most {MAX_DELTA:g}, or 0 for {DEFAULT_DELTA:g}.",
    )
    violations.check(
        0 <= message.clip_norm <= MAX_CLIP_NORM,
        f"{_FIELD}.clip_norm",
        f"must be above 0 and at most {MAX_CLIP_NORM:g}, or 0 for 1.",
    )
    violations.check(message.unit in (0, 1), f"{_FIELD}.unit", "must be UNIT_PERSON.")
    violations.check(
        message.mechanism in model_pb2.PrivacyGuarantee.Mechanism.values(),
        f"{_FIELD}.mechanism",
        "must be a mechanism of PrivacyGuarantee.",
    )
    violations.check(
        config.window.min_item_events <= 1,
        "config.window.min_item_events",
        "must be 0 or 1 with differential privacy: which items are rare tells of people.",
    )
    return DifferentialPrivacy(
        epsilon=message.epsilon,
        delta=message.delta or DEFAULT_DELTA,
        clip_norm=message.clip_norm or 1.0,
        mechanism=(
            GRADIENTS if message.mechanism == model_pb2.PrivacyGuarantee.MECHANISM_GRADIENTS else COUNTS
        ),
    )


def privacy_to_proto(private: DifferentialPrivacy | None) -> training_run_pb2.DifferentialPrivacy | None:
    """Returns what a configuration promises as the contract shows it."""
    if private is None:
        return None
    return training_run_pb2.DifferentialPrivacy(
        epsilon=private.epsilon,
        delta=private.delta,
        clip_norm=private.clip_norm,
        unit=training_run_pb2.DifferentialPrivacy.UNIT_PERSON,
        mechanism=_mechanism(private.mechanism),
    )


def guarantee_to_proto(privacy: Mapping[str, Any]) -> model_pb2.PrivacyGuarantee:
    """Returns what a manifest promises as the contract shows it."""
    return model_pb2.PrivacyGuarantee(
        epsilon=privacy["epsilon"],
        delta=privacy["delta"],
        statement=privacy["statement"],
        mechanism=_mechanism(privacy["mechanism"]),
        unit=model_pb2.PrivacyGuarantee.Unit.Value(f"UNIT_{privacy['unit']}"),
        adjacency=model_pb2.PrivacyGuarantee.Adjacency.Value(f"ADJACENCY_{privacy['adjacency']}"),
        noise_multiplier=privacy["noise_multiplier"],
        sampling_rate=privacy["sampling_rate"],
        steps=privacy["steps"],
    )


def budget_to_proto(model: str, budget: PrivacyBudget) -> privacy_budget_pb2.PrivacyBudget:
    """Returns the ledger as the contract shows it."""
    return privacy_budget_pb2.PrivacyBudget(
        model=model,
        epsilon_limit=budget.epsilon_limit,
        epsilon_spent=budget.epsilon_spent,
        delta=budget.delta,
        charges=[
            privacy_budget_pb2.PrivacyCharge(
                run_id=charge.run_id,
                epsilon=charge.epsilon,
                delta=charge.delta,
                charge_time=timestamp(charge.charged_at) if charge.charged_at else None,
                model=charge.model,
                attempt=charge.attempt,
            )
            for charge in budget.charges
        ],
    )


def _mechanism(name: str) -> Any:
    return model_pb2.PrivacyGuarantee.Mechanism.Value(f"MECHANISM_{name}")
