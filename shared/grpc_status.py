"""The one place that maps errors to gRPC statuses, and back.

Every status carries `google.rpc.ErrorInfo` (reason, domain, metadata);
`BadRequest` names the fields of invalid input; `RetryInfo` says when to come
back (https://google.aip.dev/193).
"""

from __future__ import annotations

from typing import cast

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from shared import errors

DOMAIN = "shopkeeper"

CODE_OF_ERROR: dict[type[errors.ShopkeeperError], grpc.StatusCode] = {
    errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.FailedPrecondition: grpc.StatusCode.FAILED_PRECONDITION,
    errors.Aborted: grpc.StatusCode.ABORTED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.DataLoss: grpc.StatusCode.DATA_LOSS,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
}
_ERROR_OF_CODE = {code: error for error, code in CODE_OF_ERROR.items()}


def code_of(error: errors.ShopkeeperError) -> grpc.StatusCode:
    """Returns the status code of an error; a subclass has its parent's."""
    for cls in type(error).__mro__:
        if cls in CODE_OF_ERROR:
            return CODE_OF_ERROR[cls]
    return grpc.StatusCode.INTERNAL


def to_status(error: errors.ShopkeeperError) -> status_pb2.Status:
    """Returns the rich status of an error."""
    status = status_pb2.Status(code=code_of(error).value[0], message=error.message)
    _attach(status, error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
    if isinstance(error, errors.InvalidInput) and error.violations:
        _attach(
            status,
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=v.field, description=v.description, reason=v.reason
                    )
                    for v in error.violations
                ]
            ),
        )
    if isinstance(error, errors.Retryable):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_seconds * 1e9))
        _attach(status, retry)
    return status


def internal_status(trace_id: str) -> status_pb2.Status:
    """Returns the status of an unknown failure: nothing but a trace id leaves the process."""
    status = status_pb2.Status(code=code_pb2.INTERNAL, message=f"internal error, trace id {trace_id}")
    _attach(
        status,
        error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"traceId": trace_id}),
    )
    return status


def from_rpc_error(rpc_error: grpc.RpcError) -> errors.ShopkeeperError:
    """Returns the error that the other side raised, or the transport's own failure."""
    code: grpc.StatusCode = rpc_error.code()
    message: str = rpc_error.details() or code.name
    reason, metadata, violations, retry_after = code.name, {}, [], 0.5
    for detail in _details(rpc_error):
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo()
            detail.Unpack(info)
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest()
            detail.Unpack(bad)
            violations = [
                errors.FieldViolation(v.field, v.description, v.reason) for v in bad.field_violations
            ]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
            retry_after = retry.retry_delay.ToNanoseconds() / 1e9
    error_type = _ERROR_OF_CODE.get(code)
    if error_type is None:
        return errors.ShopkeeperError(reason, message, metadata)
    if issubclass(error_type, errors.InvalidInput):
        return error_type(reason, message, metadata, violations)
    if issubclass(error_type, errors.Retryable):
        return error_type(reason, message, metadata, retry_after)
    return error_type(reason, message, metadata)


def _details(rpc_error: grpc.RpcError) -> list[any_pb2.Any]:
    try:
        status = rpc_status.from_call(cast(grpc.Call, rpc_error))
    except (ValueError, AttributeError):  # The trailer disagrees with the code, or there is no call.
        return []
    return list(status.details) if status is not None else []


def _attach(status: status_pb2.Status, detail: object) -> None:
    status.details.add().Pack(detail)
