"""Values that many requests share."""

from __future__ import annotations

from collections.abc import Sequence

from shopkeeper.trainer.v1 import training_run_pb2

from services.trainer.domain.runs import RunState
from shared.errors import FieldViolation, InvalidInput

_COMMENT_LENGTH = 1024
_REQUEST_ID_LENGTH = 128


class Violations:
    """Collects what is wrong with a request, so that a caller learns all of it at once."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def check(self, right: bool, field: str, problem: str) -> None:
        """Notes a problem unless the value is right."""
        if not right:
            self._found.append(FieldViolation(field, problem))

    def raise_any(self) -> None:
        """Raises InvalidInput when something was noted."""
        if self._found:
            words = "; ".join(f"{v.field} {v.description}" for v in self._found)
            raise InvalidInput("INVALID_REQUEST", words, {}, self._found)


def page_size(value: int) -> int:
    """Returns a page size in [1, 100]; 20 for 0."""
    violations = Violations()
    violations.check(value >= 0, "page_size", "must not be negative; 0 means 20.")
    violations.raise_any()
    return min(value, 100) or 20


def comment(value: str) -> str:
    """Returns a comment of at most 1,024 characters."""
    violations = Violations()
    violations.check(
        len(value) <= _COMMENT_LENGTH and "\0" not in value,
        "comment",
        f"must have at most {_COMMENT_LENGTH} characters and no NUL.",
    )
    violations.raise_any()
    return value


def request_id(value: str) -> str:
    """Returns a request id of at most 128 characters, or nothing."""
    violations = Violations()
    violations.check(
        len(value) <= _REQUEST_ID_LENGTH and "\0" not in value,
        "request_id",
        f"must have at most {_REQUEST_ID_LENGTH} characters and no NUL.",
    )
    violations.raise_any()
    return value


def run_id(value: str) -> str:
    """Returns a run id; anything may be asked for, but not nothing."""
    violations = Violations()
    violations.check(0 < len(value) <= 128 and "\0" not in value, "run_id", "must be the run_id of a run.")
    violations.raise_any()
    return value


def states_from_proto(values: Sequence[int]) -> list[RunState]:
    """Returns the states of a filter."""
    violations = Violations()
    states = []
    for place, value in enumerate(values):
        known = value in training_run_pb2.TrainingRun.State.values() and value != 0
        violations.check(known, f"states[{place}]", "must be a state of TrainingRun.")
        if known:
            name = training_run_pb2.TrainingRun.State.Name(value)  # type: ignore[arg-type]
            states.append(RunState(name.removeprefix("STATE_")))
    violations.raise_any()
    return states
