"""The privacy budget: what releases told about people, and what they may still tell."""

from __future__ import annotations

from services.trainer.domain.privacy import PrivacyBudget
from services.trainer.domain.runs import TrainingConfig
from services.trainer.ports import PrivacyLedger
from shared.errors import FieldViolation, InvalidInput


class PrivacyBudgets:
    """Reads the ledger, and keeps runs away that may not be.

    Args:
        required: whether runs without differential privacy are refused.
    """

    def __init__(self, ledger: PrivacyLedger, *, required: bool) -> None:
        self._ledger, self._required = ledger, required

    def get(self, model: str) -> PrivacyBudget:
        """Returns the budget of all models, with the charges of one."""
        return self._ledger.budget(model)

    def check(self, config: TrainingConfig) -> None:
        """Raises InvalidInput for a run without differential privacy where this shop requires it."""
        if self._required and config.differential_privacy is None:
            problem = "is required here (SHOPKEEPER_PRIVACY_REQUIRED); say which epsilon."
            raise InvalidInput(
                "INVALID_REQUEST",
                f"config.differential_privacy {problem}",
                {},
                [FieldViolation("config.differential_privacy", problem)],
            )

    def check_evaluation(self) -> None:
        """Raises InvalidInput where this shop requires privacy: an evaluation's measures are exact, and charged to nobody."""
        if self._required:
            problem = "cannot be evaluated anew here (SHOPKEEPER_PRIVACY_REQUIRED): measures without noise tell of people; its card has private ones."
            raise InvalidInput(
                "INVALID_REQUEST", f"version {problem}", {}, [FieldViolation("version", problem)]
            )
