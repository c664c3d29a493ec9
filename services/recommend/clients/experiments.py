"""The experiments that run, asked of feedback again and again; the last answer holds while it is away."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import grpc
from shopkeeper.feedback.v1 import experiment_pb2, feedback_service_pb2, feedback_service_pb2_grpc

from shared.experiments import Split, VariantShare
from shared.grpc_status import from_rpc_error
from shared.telemetry import get_logger

_LOGGER = get_logger("recommend.experiments")
_TIMEOUT_SECONDS = 2.0
_MOST_PAGES = 100


class ExperimentClient:
    """Implements `ports.Experiments`.

    An experiment takes effect within a poll of its start, and ends within one of its stop. With feedback
    away people stay where they are: the assignment is computed here, from what was heard last.
    """

    def __init__(self, channel: grpc.Channel, poll_seconds: float) -> None:
        self._stub = feedback_service_pb2_grpc.FeedbackServiceStub(channel)
        self._poll_seconds = poll_seconds
        self._splits: Mapping[str, Split] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="experiments", daemon=True)
        self.last_error = ""

    def split(self, placement: str) -> Split | None:
        return self._splits.get(placement)

    def start(self) -> None:
        """Begins to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the asking."""
        self._stop.set()

    def look(self) -> None:
        """Asks once. Never fails: what was heard last stays."""
        try:
            splits = {}
            request = feedback_service_pb2.ListExperimentsRequest(
                page_size=100, state=experiment_pb2.EXPERIMENT_STATE_RUNNING
            )
            for _ in range(_MOST_PAGES):
                page = self._stub.ListExperiments(request, timeout=_TIMEOUT_SECONDS)
                for experiment in page.experiments:
                    splits[experiment.placement] = split_of(experiment)
                if not page.next_page_token:
                    break
                request.page_token = page.next_page_token
        except grpc.RpcError as error:
            failure = from_rpc_error(error)
            if not self.last_error:
                _LOGGER.warning("experiments not heard of", reason=failure.reason, message=failure.message)
            self.last_error = failure.reason
        else:
            self._splits, self.last_error = splits, ""

    def _run(self) -> None:
        self.look()
        while not self._stop.wait(self._poll_seconds):
            self.look()


def split_of(experiment: experiment_pb2.Experiment) -> Split:
    """Returns how an experiment divides people."""
    return Split(
        experiment.experiment_id,
        experiment.salt or experiment.experiment_id,
        experiment.traffic_fraction or 1.0,
        tuple(
            VariantShare(variant.variant_id, variant.weight, variant.serving_config)
            for variant in experiment.variants
        ),
    )
