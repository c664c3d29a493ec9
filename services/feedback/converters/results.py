"""What became of a request, as the contract says it."""

from __future__ import annotations

from collections.abc import Sequence

from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2

from services.feedback.domain.events import RecordedBatch, RowProblem, RowStatus, divided
from shared.tokens import ConsistencyToken, TokenSigner

_STORED = event_pb2.EventResult(status=event_pb2.EVENT_STATUS_STORED)


def _serialised(result: event_pb2.EventResult) -> bytes:
    return feedback_service_pb2.RecordEventsResponse(results=[result]).SerializeToString()


# By status, where there is no more to say. A repeated field may come in parts: an answer is its results' bytes, joined.
_BARE_RESULTS = {
    status: _serialised(event_pb2.EventResult(status=event_pb2.EventStatus.ValueType(int(status))))
    for status in RowStatus
}
_STORED_RESULT = _BARE_RESULTS[RowStatus.STORED]


def to_results(recorded: RecordedBatch) -> list[event_pb2.EventResult]:
    """Returns one result an event, in the order of the request."""
    results = [_STORED] * recorded.size
    for index, (status, problem) in recorded.exceptions.items():
        results[index] = _result(status, problem)
    return results


def _result(status: RowStatus, problem: RowProblem | None) -> event_pb2.EventResult:
    if problem is None:
        return event_pb2.EventResult(status=_wire(status))
    return event_pb2.EventResult(
        status=_wire(status),
        reason=event_pb2.EventReason.ValueType(int(problem.reason)),
        field=problem.field,
        message=problem.message,
    )


def to_record_events_response(recorded: RecordedBatch, signer: TokenSigner) -> bytes:
    """Returns the serialised `RecordEventsResponse`."""
    return _response(recorded, _serialised_token(recorded, signer))


def to_record_events_responses(
    recorded: RecordedBatch, starts: Sequence[int], signer: TokenSigner
) -> list[bytes]:
    """Returns one serialised `RecordEventsResponse` a request, of requests that were stored together."""
    token = _serialised_token(recorded, signer)
    if recorded.exceptions:
        return [_response(part, b"" if part.xid is None else token) for part in divided(recorded, starts)]
    ends = [*starts[1:], recorded.size]
    return [_STORED_RESULT * (end - start) + token for start, end in zip(starts, ends, strict=True)]


def _response(recorded: RecordedBatch, token: bytes) -> bytes:
    if not recorded.exceptions:
        return _STORED_RESULT * recorded.size + token
    results = [_STORED_RESULT] * recorded.size
    for index, (status, problem) in recorded.exceptions.items():
        results[index] = _BARE_RESULTS[status] if problem is None else _serialised(_result(status, problem))
    return b"".join(results) + token


def _serialised_token(recorded: RecordedBatch, signer: TokenSigner) -> bytes:
    return feedback_service_pb2.RecordEventsResponse(
        consistency_token=to_consistency_token(recorded, signer)
    ).SerializeToString()


def to_consistency_token(recorded: RecordedBatch, signer: TokenSigner) -> str:
    """Returns the signed token of the commit, or an empty text when nothing is durable."""
    return "" if recorded.xid is None else ConsistencyToken(recorded.xid).sign(signer)


def _wire(status: RowStatus) -> event_pb2.EventStatus.ValueType:
    return event_pb2.EventStatus.ValueType(int(status))
