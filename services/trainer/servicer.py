"""Convert, call, convert."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.trainer.v1 import (
    model_pb2,
    privacy_budget_pb2,
    schedule_pb2,
    trainer_service_pb2,
    trainer_service_pb2_grpc,
    training_run_pb2,
)

from services.trainer import converters
from services.trainer.domain.runs import DEFAULT_MODEL, PRODUCTION, check_name
from services.trainer.use_cases import Models, PrivacyBudgets, Schedules, TrainingRuns
from shared.errors import FieldViolation, InvalidInput
from shared.tokens import TokenSigner


class TrainerServicer(trainer_service_pb2_grpc.TrainerServiceServicer):
    """shopkeeper.trainer.v1.TrainerService."""

    def __init__(
        self,
        runs: TrainingRuns,
        models: Models,
        schedules: Schedules,
        budgets: PrivacyBudgets,
        signer: TokenSigner,
    ) -> None:
        self._runs, self._models, self._schedules = runs, models, schedules
        self._budgets, self._signer = budgets, signer

    # ---- runs

    def CreateTrainingRun(
        self, request: trainer_service_pb2.CreateTrainingRunRequest, context: grpc.ServicerContext
    ) -> training_run_pb2.TrainingRun:
        model = check_name(request.model, "model", DEFAULT_MODEL)
        config = converters.config_from_proto(request.config)
        request_id = converters.request_id(request.request_id)
        self._budgets.check(config)
        return converters.run_to_proto(self._runs.create(model, config, request_id))

    def GetTrainingRun(
        self, request: trainer_service_pb2.GetTrainingRunRequest, context: grpc.ServicerContext
    ) -> training_run_pb2.TrainingRun:
        return converters.run_to_proto(self._runs.get(converters.run_id(request.run_id)))

    def ListTrainingRuns(
        self, request: trainer_service_pb2.ListTrainingRunsRequest, context: grpc.ServicerContext
    ) -> trainer_service_pb2.ListTrainingRunsResponse:
        page = self._runs.list(
            check_name(request.model, "model", DEFAULT_MODEL) if request.model else "",
            converters.states_from_proto(request.states),
            converters.page_size(request.page_size),
            converters.read_run_page(self._signer, request.page_token),
        )
        return trainer_service_pb2.ListTrainingRunsResponse(
            training_runs=[converters.run_to_proto(run) for run in page.items],
            next_page_token=converters.sign_run_page(self._signer, page.items[-1]) if page.has_more else "",
        )

    def WatchTrainingRun(
        self, request: trainer_service_pb2.WatchTrainingRunRequest, context: grpc.ServicerContext
    ) -> Iterator[trainer_service_pb2.WatchTrainingRunResponse]:
        if request.after_sequence_number < 0:
            problem = "must not be negative; 0 asks for everything."
            raise InvalidInput(
                "INVALID_REQUEST",
                f"after_sequence_number {problem}",
                {},
                [FieldViolation("after_sequence_number", problem)],
            )
        watched = self._runs.watch(
            converters.run_id(request.run_id), request.after_sequence_number, context.is_active
        )
        for entries, run in watched:
            yield trainer_service_pb2.WatchTrainingRunResponse(
                progress=[converters.progress_to_proto(entry) for entry in entries],
                training_run=converters.run_to_proto(run),
            )

    def CancelTrainingRun(
        self, request: trainer_service_pb2.CancelTrainingRunRequest, context: grpc.ServicerContext
    ) -> training_run_pb2.TrainingRun:
        run = self._runs.cancel(converters.run_id(request.run_id), converters.comment(request.comment))
        return converters.run_to_proto(run)

    # ---- models

    def ListModels(
        self, request: trainer_service_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> trainer_service_pb2.ListModelsResponse:
        page = self._models.list(
            converters.page_size(request.page_size),
            converters.read_name_page(self._signer, "models", request.page_token),
        )
        return trainer_service_pb2.ListModelsResponse(
            models=[converters.model_to_proto(model) for model in page.items],
            next_page_token=(
                converters.sign_name_page(self._signer, "models", page.items[-1].name)
                if page.has_more
                else ""
            ),
        )

    def GetModel(
        self, request: trainer_service_pb2.GetModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.Model:
        return converters.model_to_proto(self._models.get(check_name(request.model, "model", DEFAULT_MODEL)))

    def ListModelVersions(
        self, request: trainer_service_pb2.ListModelVersionsRequest, context: grpc.ServicerContext
    ) -> trainer_service_pb2.ListModelVersionsResponse:
        model = check_name(request.model, "model", DEFAULT_MODEL)
        page, damaged = self._models.list_versions(
            model,
            converters.page_size(request.page_size),
            converters.read_name_page(self._signer, f"versions of {model}", request.page_token),
        )
        last = min([*(version.version for version in page.items), *damaged], default="")
        return trainer_service_pb2.ListModelVersionsResponse(
            model_versions=[converters.version_to_proto(version) for version in page.items],
            damaged_versions=damaged,
            next_page_token=(
                converters.sign_name_page(self._signer, f"versions of {model}", last) if page.has_more else ""
            ),
        )

    def GetModelVersion(
        self, request: trainer_service_pb2.GetModelVersionRequest, context: grpc.ServicerContext
    ) -> model_pb2.ModelVersion:
        version = self._models.get_version(
            check_name(request.model, "model", DEFAULT_MODEL), check_name(request.version, "version", "")
        )
        return converters.version_to_proto(version)

    def PromoteModel(
        self, request: trainer_service_pb2.PromoteModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.Model:
        model = self._models.promote(
            check_name(request.model, "model", DEFAULT_MODEL),
            check_name(request.version, "version", ""),
            check_name(request.alias, "alias", PRODUCTION),
            force=request.force,
            comment=converters.comment(request.comment),
            expected=request.expected_current_version or None,
        )
        return converters.model_to_proto(model)

    def RollbackModel(
        self, request: trainer_service_pb2.RollbackModelRequest, context: grpc.ServicerContext
    ) -> model_pb2.Model:
        model = self._models.roll_back(
            check_name(request.model, "model", DEFAULT_MODEL),
            check_name(request.alias, "alias", PRODUCTION),
            comment=converters.comment(request.comment),
            expected=request.expected_current_version or None,
        )
        return converters.model_to_proto(model)

    def WatchAliases(
        self, request: trainer_service_pb2.WatchAliasesRequest, context: grpc.ServicerContext
    ) -> Iterator[trainer_service_pb2.WatchAliasesResponse]:
        model = check_name(request.model, "model", DEFAULT_MODEL) if request.model else ""
        for name, alias, complete in self._models.watch_aliases(model, context.is_active):
            observed_at = Timestamp()
            observed_at.GetCurrentTime()
            yield trainer_service_pb2.WatchAliasesResponse(
                model=name,
                alias=converters.alias_to_proto(alias) if alias else None,
                snapshot_complete=complete,
                observed_at=observed_at,
            )

    def GetPrivacyBudget(
        self, request: trainer_service_pb2.GetPrivacyBudgetRequest, context: grpc.ServicerContext
    ) -> privacy_budget_pb2.PrivacyBudget:
        model = check_name(request.model, "model", DEFAULT_MODEL)
        return converters.budget_to_proto(model, self._budgets.get(model))

    # ---- evaluation, tuning, schedules

    def EvaluateModel(
        self, request: trainer_service_pb2.EvaluateModelRequest, context: grpc.ServicerContext
    ) -> training_run_pb2.TrainingRun:
        self._budgets.check_evaluation()
        run = self._runs.evaluate(
            check_name(request.model, "model", DEFAULT_MODEL),
            check_name(request.version, "version", PRODUCTION),
            converters.evaluation_from_proto(request),
            converters.request_id(request.request_id),
        )
        return converters.run_to_proto(run)

    def TuneModel(
        self, request: trainer_service_pb2.TuneModelRequest, context: grpc.ServicerContext
    ) -> training_run_pb2.TrainingRun:
        config = converters.config_from_proto(request.config)
        self._budgets.check(config)
        run = self._runs.tune(
            check_name(request.model, "model", DEFAULT_MODEL),
            config,
            converters.tuning_from_proto(request),
            converters.request_id(request.request_id),
        )
        return converters.run_to_proto(run)

    def CreateSchedule(
        self, request: trainer_service_pb2.CreateScheduleRequest, context: grpc.ServicerContext
    ) -> schedule_pb2.Schedule:
        schedule = converters.schedule_from_proto(request)
        self._budgets.check(schedule.config)
        return converters.schedule_to_proto(self._schedules.create(schedule))

    def ListSchedules(
        self, request: trainer_service_pb2.ListSchedulesRequest, context: grpc.ServicerContext
    ) -> trainer_service_pb2.ListSchedulesResponse:
        page = self._schedules.list(
            converters.page_size(request.page_size),
            converters.read_name_page(self._signer, "schedules", request.page_token),
        )
        return trainer_service_pb2.ListSchedulesResponse(
            schedules=[converters.schedule_to_proto(schedule) for schedule in page.items],
            next_page_token=(
                converters.sign_name_page(self._signer, "schedules", page.items[-1].schedule_id)
                if page.has_more
                else ""
            ),
        )

    def DeleteSchedule(
        self, request: trainer_service_pb2.DeleteScheduleRequest, context: grpc.ServicerContext
    ) -> trainer_service_pb2.DeleteScheduleResponse:
        self._schedules.delete(check_name(request.schedule_id, "schedule_id", ""))
        return trainer_service_pb2.DeleteScheduleResponse()
