"""What the trainer's callers can do. Pure: the world is behind ports."""

from services.trainer.use_cases.models import Models
from services.trainer.use_cases.privacy import PrivacyBudgets
from services.trainer.use_cases.runs import TrainingRuns
from services.trainer.use_cases.schedules import Schedules

__all__ = ["Models", "PrivacyBudgets", "Schedules", "TrainingRuns"]
