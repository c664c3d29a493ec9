"""The FeedbackService over gRPC: convert, call, convert."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

import grpc
from shopkeeper.feedback.v1 import (
    consent_pb2,
    experiment_pb2,
    feedback_service_pb2,
    feedback_service_pb2_grpc,
    import_pb2,
    metrics_pb2,
)

from services.feedback.converters.events import EventReader
from services.feedback.converters.experiments import (
    from_create,
    from_etag,
    from_experiment_id,
    from_list,
    to_experiment,
    to_list,
    to_report,
)
from services.feedback.converters.identities import Door
from services.feedback.converters.imports import (
    from_import_events,
    from_list_imports,
    to_import,
    to_list_imports,
)
from services.feedback.converters.metrics import (
    confidence_level,
    from_get_metrics,
    from_watch_metrics,
    to_metrics,
)
from services.feedback.converters.off_policy import from_estimate, to_policy_value
from services.feedback.converters.people import from_consent, to_consent, to_receipt
from services.feedback.converters.results import to_consistency_token, to_record_events_response, to_results
from services.feedback.converters.unknown_items import from_list_unknown_items, to_list_unknown_items
from services.feedback.converters.upkeep import from_purge_events, from_rotate_user_keys, to_key_rotation
from services.feedback.domain.events import ReadBatch
from services.feedback.recording import Recorder, count
from services.feedback.use_cases import (
    ExportUser,
    ForgetUser,
    ManageConsent,
    ManageImports,
    MeasureMetrics,
    PendingBatch,
    PurgeEvents,
    RecordEvents,
    ReportUnknownItems,
    RotateUserKeys,
    RunExperiments,
    ValuePolicies,
    commit_timeout,
)
from shared.admission import Priority
from shared.deadline import time_remaining_seconds
from shared.deferred_calls import Deferral
from shared.errors import ResourceExhausted, Unavailable
from shared.tokens import TokenSigner

SERVICE_NAME = "shopkeeper.feedback.v1.FeedbackService"
# Under overload reports wait first, and what a person decides about themselves last.
PRIORITIES = {
    **dict.fromkeys(
        (
            "GetMetrics",
            "WatchMetrics",
            "GetExperimentReport",
            "EstimatePolicyValue",
            "ExportUser",
            "PurgeEvents",
        ),
        Priority.LOW,
    ),
    **dict.fromkeys(("SetConsent", "ForgetUser"), Priority.HIGH),
}


@dataclass(frozen=True, slots=True)
class UseCases:
    """What the servicer calls."""

    record_events: RecordEvents
    consent: ManageConsent
    forget_user: ForgetUser
    export_user: ExportUser
    metrics: MeasureMetrics
    experiments: RunExperiments
    policies: ValuePolicies
    imports: ManageImports
    purge: PurgeEvents
    rotation: RotateUserKeys
    unknown_items: ReportUnknownItems


class FeedbackServicer(feedback_service_pb2_grpc.FeedbackServiceServicer):
    """See feedback_service.proto.

    Args:
        use_cases: what is called.
        reader: reads events.
        door: turns raw ids into keys.
        signer: signs consistency tokens.
        commit_timeout_seconds: for calls that have no deadline.
        stream_read_ahead: batches of a stream that may be on their way at once.
    """

    def __init__(
        self,
        use_cases: UseCases,
        reader: EventReader,
        door: Door,
        signer: TokenSigner,
        *,
        commit_timeout_seconds: float = 15.0,
        stream_read_ahead: int = 4,
    ) -> None:
        self._use_cases = use_cases
        self._reader = reader
        self._door = door
        self._signer = signer
        self._commit_timeout_seconds = commit_timeout_seconds
        self._stream_read_ahead = stream_read_ahead
        self._draining = threading.Event()
        self._recorder = Recorder(reader, use_cases.record_events, signer)

    def close(self) -> None:
        """Queues what has come for its commit."""
        self._recorder.close()

    @property
    def deferral(self) -> Deferral:
        """How `RecordEvents` is answered without a thread a call."""
        return Deferral(self._recorder.begin, self._commit_timeout_seconds, commit_timeout)

    def drain(self) -> None:
        """Ends streams that wait for the next moment."""
        self._draining.set()

    # Recording

    def RecordEvents(self, request: bytes, context: grpc.ServicerContext) -> bytes:  # type: ignore[override]
        """Records a batch, where `deferral` cannot; see `add_to_server` for why it takes and returns bytes."""
        batch = self._reader.read_request(request)
        timeout = time_remaining_seconds(context, self._commit_timeout_seconds)
        recorded = self._use_cases.record_events.submit(batch).wait(timeout)
        count(batch, recorded)
        return to_record_events_response(recorded, self._signer)

    def StreamEvents(
        self,
        request_iterator: Iterator[feedback_service_pb2.StreamEventsRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[feedback_service_pb2.StreamEventsResponse]:
        """Records batches, acknowledged in order."""
        for batch_number, pending in self._read_ahead(request_iterator, context):
            recorded = pending.wait(time_remaining_seconds(context, self._commit_timeout_seconds))
            count(pending.batch, recorded)
            yield feedback_service_pb2.StreamEventsResponse(
                batch_number=batch_number,
                results=to_results(recorded),
                consistency_token=to_consistency_token(recorded, self._signer),
            )

    def _read_ahead(
        self, request_iterator: Iterator[Any], context: grpc.ServicerContext
    ) -> Iterator[tuple[int, PendingBatch]]:
        # Reading while commits are under way is what lets one stream fill them; the bound is what slows it down.
        submitted: queue.Queue[tuple[int, PendingBatch] | Exception | None] = queue.Queue(
            self._stream_read_ahead
        )
        finished = threading.Event()

        def put(entry: tuple[int, PendingBatch] | Exception | None) -> bool:
            while not finished.is_set():
                try:
                    submitted.put(entry, timeout=0.25)
                    return True
                except queue.Full:
                    continue
            return False

        def read() -> None:
            try:
                for request in request_iterator:
                    pending = self._submit_patiently(self._reader.read(request.events), finished)
                    if pending is None or not put((request.batch_number, pending)):
                        return
                put(None)
            except Exception as error:
                # A caller that went away ends the iterator with an error of grpc's; nobody listens then.
                put(error)

        reader = threading.Thread(target=read, name="stream-reader", daemon=True)
        reader.start()
        try:
            while context.is_active() and not self._draining.is_set():
                try:
                    entry = submitted.get(timeout=0.25)
                except queue.Empty:
                    continue
                if entry is None:
                    return
                if isinstance(entry, Exception):
                    if not context.is_active():
                        return
                    raise entry
                yield entry
            if self._draining.is_set():
                raise Unavailable(
                    "LOG_UNAVAILABLE", "This replica is stopping; send unacknowledged batches again."
                )
        finally:
            finished.set()

    def _submit_patiently(self, batch: ReadBatch, finished: threading.Event) -> PendingBatch | None:
        # A stream is slowed down where a single call would be refused: its sender feels it as flow control.
        while not finished.is_set():
            try:
                return self._use_cases.record_events.submit(batch)
            except ResourceExhausted:
                finished.wait(0.02)
        return None

    # People

    def SetConsent(
        self, request: feedback_service_pb2.SetConsentRequest, context: grpc.ServicerContext
    ) -> consent_pb2.Consent:
        """Sets what a person allows."""
        person = self._door.person(request.user_id)
        consent = from_consent(request.consent)
        return to_consent(self._use_cases.consent.set(person.user_keys, person.tombstone_key, consent))

    def GetConsent(
        self, request: feedback_service_pb2.GetConsentRequest, context: grpc.ServicerContext
    ) -> consent_pb2.Consent:
        """Returns what a person allows."""
        person = self._door.person(request.user_id)
        return to_consent(self._use_cases.consent.get(person.user_keys, person.tombstone_key))

    def ForgetUser(
        self, request: feedback_service_pb2.ForgetUserRequest, context: grpc.ServicerContext
    ) -> consent_pb2.ErasureReceipt:
        """Erases a person."""
        person = self._door.person(request.user_id)
        return to_receipt(self._use_cases.forget_user.forget(person.user_keys, person.tombstone_key))

    def GetErasureReceipt(
        self, request: feedback_service_pb2.GetErasureReceiptRequest, context: grpc.ServicerContext
    ) -> consent_pb2.ErasureReceipt:
        """Issues a receipt anew."""
        return to_receipt(self._use_cases.forget_user.issue_anew(request.receipt_id))

    def ExportUser(
        self, request: feedback_service_pb2.ExportUserRequest, context: grpc.ServicerContext
    ) -> Iterator[feedback_service_pb2.ExportUserResponse]:
        """Streams all that is known of a person."""
        person = self._door.person(request.user_id)
        for lines in self._use_cases.export_user.export(person.user_keys, person.tombstone_key):
            yield feedback_service_pb2.ExportUserResponse(json_lines=lines)

    # Metrics

    def GetMetrics(
        self, request: feedback_service_pb2.GetMetricsRequest, context: grpc.ServicerContext
    ) -> metrics_pb2.Metrics:
        """Returns online metrics."""
        query = from_get_metrics(request, datetime.now(UTC))
        return to_metrics(query, self._use_cases.metrics.measure(query))

    def WatchMetrics(
        self, request: feedback_service_pb2.WatchMetricsRequest, context: grpc.ServicerContext
    ) -> Iterator[metrics_pb2.Metrics]:
        """Returns online metrics again and again."""
        window, interval_seconds, query_of = from_watch_metrics(request)
        for query, measured in self._use_cases.metrics.watch(
            window, interval_seconds, query_of, self._draining, context.is_active
        ):
            yield to_metrics(query, measured)

    # Experiments

    def CreateExperiment(
        self, request: feedback_service_pb2.CreateExperimentRequest, context: grpc.ServicerContext
    ) -> experiment_pb2.Experiment:
        """Starts an experiment."""
        experiment = from_create(request, datetime.now(UTC))
        return to_experiment(self._use_cases.experiments.create(experiment))

    def GetExperiment(
        self, request: feedback_service_pb2.GetExperimentRequest, context: grpc.ServicerContext
    ) -> experiment_pb2.Experiment:
        """Returns an experiment."""
        return to_experiment(self._use_cases.experiments.get(from_experiment_id(request.experiment_id)))

    def ListExperiments(
        self, request: feedback_service_pb2.ListExperimentsRequest, context: grpc.ServicerContext
    ) -> feedback_service_pb2.ListExperimentsResponse:
        """Returns experiments, newest first."""
        experiments, more = self._use_cases.experiments.page(*from_list(request, self._signer))
        return to_list(request, experiments, more, self._signer)

    def StopExperiment(
        self, request: feedback_service_pb2.StopExperimentRequest, context: grpc.ServicerContext
    ) -> experiment_pb2.Experiment:
        """Stops an experiment."""
        experiment_id, version = from_experiment_id(request.experiment_id), from_etag(request.etag)
        return to_experiment(self._use_cases.experiments.stop(experiment_id, version))

    def GetExperimentReport(
        self, request: feedback_service_pb2.GetExperimentReportRequest, context: grpc.ServicerContext
    ) -> experiment_pb2.ExperimentReport:
        """Returns what an experiment has shown."""
        experiment_id = from_experiment_id(request.experiment_id)
        report = self._use_cases.experiments.report(experiment_id, confidence_level(request))
        return to_report(
            report.experiment,
            report.observation,
            report.judgement,
            report.measured,
            report.confidence_level,
            report.reported_at,
        )

    # Imports

    def ImportEvents(
        self, request: feedback_service_pb2.ImportEventsRequest, context: grpc.ServicerContext
    ) -> import_pb2.Import:
        """Begins an import."""
        source, request_id = from_import_events(request)
        return to_import(self._use_cases.imports.begin(source, request_id))

    def GetImport(
        self, request: feedback_service_pb2.GetImportRequest, context: grpc.ServicerContext
    ) -> import_pb2.Import:
        """Returns an import."""
        return to_import(self._use_cases.imports.get(request.import_id))

    def ListImports(
        self, request: feedback_service_pb2.ListImportsRequest, context: grpc.ServicerContext
    ) -> feedback_service_pb2.ListImportsResponse:
        """Returns imports, newest first."""
        after, limit = from_list_imports(request, self._signer)
        return to_list_imports(self._use_cases.imports.page(after, limit + 1), limit, self._signer)

    def WatchImport(
        self, request: feedback_service_pb2.WatchImportRequest, context: grpc.ServicerContext
    ) -> Iterator[import_pb2.Import]:
        """Follows an import to its end."""
        for one in self._use_cases.imports.watch(request.import_id, self._draining, context.is_active):
            yield to_import(one)

    def CancelImport(
        self, request: feedback_service_pb2.CancelImportRequest, context: grpc.ServicerContext
    ) -> import_pb2.Import:
        """Stops an import."""
        return to_import(self._use_cases.imports.cancel(request.import_id))

    # Upkeep

    def PurgeEvents(
        self, request: feedback_service_pb2.PurgeEventsRequest, context: grpc.ServicerContext
    ) -> feedback_service_pb2.PurgeEventsResponse:
        """Erases events of a time range, or counts them."""
        start, end, kinds = from_purge_events(request)
        count = self._use_cases.purge.purge(start, end, kinds, force=request.force, goes_on=context.is_active)
        return feedback_service_pb2.PurgeEventsResponse(event_count=count, dry_run=not request.force)

    def RotateUserKeys(
        self, request: feedback_service_pb2.RotateUserKeysRequest, context: grpc.ServicerContext
    ) -> consent_pb2.KeyRotation:
        """Begins a rotation of the user key, or goes on with it."""
        return to_key_rotation(self._use_cases.rotation.begin(from_rotate_user_keys(request)))

    def GetKeyRotation(
        self, request: feedback_service_pb2.GetKeyRotationRequest, context: grpc.ServicerContext
    ) -> consent_pb2.KeyRotation:
        """Returns a rotation of the user key."""
        return to_key_rotation(self._use_cases.rotation.get(request.key_rotation_id))

    def ListUnknownItems(
        self, request: feedback_service_pb2.ListUnknownItemsRequest, context: grpc.ServicerContext
    ) -> feedback_service_pb2.ListUnknownItemsResponse:
        """Returns items that the catalogue does not know."""
        order, after, size = from_list_unknown_items(request, self._signer)
        page = self._use_cases.unknown_items.page(order, after, size)
        return to_list_unknown_items(order, page, self._signer)

    def EstimatePolicyValue(
        self, request: feedback_service_pb2.EstimatePolicyValueRequest, context: grpc.ServicerContext
    ) -> experiment_pb2.PolicyValue:
        """Estimates what another policy would have earned."""
        asked = from_estimate(request, datetime.now(UTC))
        estimate, currency_code = self._use_cases.policies.estimate(
            asked.placement,
            asked.start,
            asked.end,
            asked.reward,
            asked.policy,
            asked.weight_clip,
            asked.confidence_level,
        )
        return to_policy_value(estimate, currency_code)


class _RecordEventsInBytes:
    """A server to which the generated code adds its handlers, of which one is replaced."""

    def __init__(self, servicer: FeedbackServicer, server: grpc.Server) -> None:
        self._servicer = servicer
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Does nothing: handlers that are registered by name come first, and are the same."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        def record_events(request: bytes, context: grpc.ServicerContext) -> bytes:
            return self._servicer.RecordEvents(request, context)

        record_events.deferral = self._servicer.deferral  # type: ignore[attr-defined]
        in_bytes: Any = grpc.unary_unary_rpc_method_handler(record_events)
        self._server.add_registered_method_handlers(service, {**handlers, "RecordEvents": in_bytes})


def add_to_server(servicer: FeedbackServicer, server: grpc.Server) -> None:
    """Adds the servicer to a server.

    `RecordEvents` gets its requests as they came from the wire: a message object an event would cost more than
    all else that is done with it. See docs/decisions/0016-events-are-read-from-the-wire-by-columns.md.
    """
    feedback_service_pb2_grpc.add_FeedbackServiceServicer_to_server(
        servicer, cast(grpc.Server, _RecordEventsInBytes(servicer, server))
    )
