"""What the feedback service does, step by step, without gRPC and SQL."""

from services.feedback.use_cases.catalogue import ReportUnknownItems
from services.feedback.use_cases.experiments import ExperimentReport, RunExperiments
from services.feedback.use_cases.imports import ManageImports, RunImports
from services.feedback.use_cases.measuring import MeasureMetrics, ValuePolicies
from services.feedback.use_cases.people import ExportUser, ForgetUser, ManageConsent
from services.feedback.use_cases.recording import PendingBatch, RecordEvents, commit_timeout
from services.feedback.use_cases.upkeep import PurgeEvents, RotateUserKeys

__all__ = [
    "ExperimentReport",
    "ExportUser",
    "ForgetUser",
    "ManageConsent",
    "ManageImports",
    "MeasureMetrics",
    "PendingBatch",
    "PurgeEvents",
    "RecordEvents",
    "ReportUnknownItems",
    "RotateUserKeys",
    "RunExperiments",
    "RunImports",
    "ValuePolicies",
    "commit_timeout",
]
