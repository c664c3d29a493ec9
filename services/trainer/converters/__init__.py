"""Protobuf <-> domain, and validation of what a caller sent."""

from services.trainer.converters.checks import comment, page_size, request_id, run_id, states_from_proto
from services.trainer.converters.config import config_from_proto, config_to_proto, evaluation_from_proto
from services.trainer.converters.models import alias_to_proto, model_to_proto, version_to_proto
from services.trainer.converters.pages import read_name_page, read_run_page, sign_name_page, sign_run_page
from services.trainer.converters.privacy import budget_to_proto
from services.trainer.converters.runs import progress_to_proto, run_to_proto
from services.trainer.converters.schedules import schedule_from_proto, schedule_to_proto, tuning_from_proto

__all__ = [
    "alias_to_proto",
    "budget_to_proto",
    "comment",
    "config_from_proto",
    "config_to_proto",
    "evaluation_from_proto",
    "model_to_proto",
    "page_size",
    "progress_to_proto",
    "read_name_page",
    "read_run_page",
    "request_id",
    "run_id",
    "run_to_proto",
    "schedule_from_proto",
    "schedule_to_proto",
    "sign_name_page",
    "sign_run_page",
    "states_from_proto",
    "tuning_from_proto",
    "version_to_proto",
]
