"""What became of a request, as the contract says it."""

from __future__ import annotations

from shopkeeper.feedback.v1 import event_pb2, feedback_service_pb2

from services.feedback.domain.events import RecordedBatch, RowStatus
from shared.tokens import ConsistencyToken, TokenSigner

_STORED = event_pb2.EventResult(status=event_pb2.EVENT_STATUS_STORED)
_STORED_RESULT = feedback_service_pb2.RecordEventsResponse(results=[_STORED]).SerializeToString()


def to_results(recorded: RecordedBatch) -> list[event_pb2.EventResult]:
    """Returns one result an event, in the order of the request."""
    results = [_STORED] * recorded.size
    for index, (status, problem) in recorded.exceptions.items():
        if problem is None:
            results[index] = event_pb2.EventResult(status=_wire(status))
        else:
            results[index] = event_pb2.EventResult(
                status=_wire(status),
                reason=event_pb2.EventReason.ValueType(int(problem.reason)),
                field=problem.field,
                message=problem.message,
            )
    return results


def to_record_events_response(recorded: RecordedBatch, signer: TokenSigner) -> bytes:
    """Returns the serialised `RecordEventsResponse`."""
    rest = feedback_service_pb2.RecordEventsResponse(consistency_token=to_consistency_token(recorded, signer))
    if recorded.exceptions:
        rest.results.extend(to_results(recorded))
        return rest.SerializeToString()
    # Fields may come in any order, and a repeated one in parts: all of the answer but the token is always the same.
    return _STORED_RESULT * recorded.size + rest.SerializeToString()


def to_consistency_token(recorded: RecordedBatch, signer: TokenSigner) -> str:
    """Returns the signed token of the commit, or an empty text when nothing is durable."""
    return "" if recorded.xid is None else ConsistencyToken(recorded.xid).sign(signer)


def _wire(status: RowStatus) -> event_pb2.EventStatus.ValueType:
    return event_pb2.EventStatus.ValueType(int(status))
