"""Serving configs and rules: messages to domain and back, and their documents on disk."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1 import rule_pb2, serving_config_pb2

from services.recommend.converters.filter_language import FilterLanguage
from services.recommend.converters.requests import Checker
from services.recommend.converters.responses import timestamp_of
from services.recommend.domain.rules import Action, Cap, Exclude, GroupBy, MinimumShare, Pin, Rule, Shift
from services.recommend.domain.serving_config import (
    PLACEMENT_POLICIES,
    DiversityAlgorithm,
    PlacementPolicy,
    Scorer,
    ServingConfig,
)
from services.recommend.domain.source import DEFAULT_CANDIDATE_LIMIT, Source, SourceWeight

_M = TypeVar("_M", bound=Message)
_N = TypeVar("_N", int, float)

SCHEMA = 1
_GROUPS = frozenset(int(group) for group in GroupBy)
MAX_DISPLAY_NAME = 256
MAX_RULES = 100
MAX_PINS = 100
MAX_PLACEMENTS = 100
MAX_SOURCES = 10
_WEIGHED_SOURCES = frozenset(int(source) for source in Source if source is not Source.RULE)
_OUTPUT_ONLY = frozenset({"built_in", "version", "create_time", "update_time"})
_MAX_WEIGHT = 1000
_MAX_CANDIDATES = 10_000


class ConfigurationConverter:
    """Checks and converts; implements `ports.Codec`.

    Args:
        filters: parses the filters of rules and policies, so that a wrong one is refused when it is written.
    """

    def __init__(self, filters: FilterLanguage, model: str = "main", alias: str = "production") -> None:
        self._filters = filters
        self._model = model
        self._alias = alias

    def rule(self, rule_id: str, message: rule_pb2.Rule, prefix: str = "rule.") -> Rule:
        """Returns the rule of a message.

        Raises:
            InvalidInput: INVALID_REQUEST, INVALID_FILTER; every violation that was found.
        """
        check = Checker(prefix)
        _display_name(check, message.display_name)
        action = self._action(check, message)
        if len(message.active_time_ranges) > MAX_RULES:
            check.wrong(
                "active_time_ranges", f"has {len(message.active_time_ranges)} entries; the most is 100"
            )
        active = []
        for n, span in enumerate(message.active_time_ranges):
            path = f"active_time_ranges[{n}]"
            start = check.time(f"{path}.start_time", span.start_time) if span.HasField("start_time") else None
            end = check.time(f"{path}.end_time", span.end_time) if span.HasField("end_time") else None
            if start is not None and end is not None and end <= start:
                check.wrong(f"{path}.end_time", "must be after start_time")
            active.append((start, end))
        placements = tuple(
            check.name(f"placements[{n}]", name, "") for n, name in enumerate(message.placements)
        )
        if len(placements) > MAX_PLACEMENTS or "" in placements:
            check.wrong("placements", f"must be at most {MAX_PLACEMENTS} names, none of them empty")
        check.finish()
        assert action is not None
        return Rule(
            rule_id=rule_id,
            display_name=message.display_name,
            action=action,
            active=tuple(active),
            placements=placements,
            disabled=message.disabled,
        )

    def serving_config(
        self, config_id: str, message: serving_config_pb2.ServingConfig, prefix: str = "serving_config."
    ) -> ServingConfig:
        """Returns the serving config of a message.

        Raises:
            InvalidInput: INVALID_REQUEST, INVALID_FILTER; every violation that was found.
        """
        check = Checker(prefix)
        _display_name(check, message.display_name)
        scorer_name = _enum_name(serving_config_pb2.ServingConfig.Scorer, message.scorer)
        scorer = Scorer.BLENDED
        if not scorer_name:
            check.wrong("scorer", f"{message.scorer} is not a value of its enum")
        elif message.scorer:
            scorer = Scorer(scorer_name)
        sources = self._sources(check, message, scorer)
        named = {
            field: check.name(field, getattr(message, field), "")
            for field in ("model", "model_alias", "shadow_model_alias")
        }
        for field, served in (("model", self._model), ("model_alias", self._alias)):
            if named[field] == served:
                named[field] = ""
        alpha = message.cosine_alpha if message.HasField("cosine_alpha") else 0.5
        _within(check, "cosine_alpha", alpha, 0, 10)
        diversity = message.diversity
        algorithm = DiversityAlgorithm.MMR
        if diversity.algorithm == serving_config_pb2.Diversity.ALGORITHM_DPP:
            algorithm = DiversityAlgorithm.DPP
        elif not _enum_name(serving_config_pb2.Diversity.Algorithm, diversity.algorithm):
            check.wrong("diversity.algorithm", f"{diversity.algorithm} is not a value of its enum")
        _within(check, "diversity.strength", diversity.strength, 0, 1)
        _within(check, "diversity.depth", diversity.depth, 0, 500)
        _within(check, "exploration.slots", message.exploration.slots, 0, 10)
        _within(check, "exploration.probability", message.exploration.probability, 0, 1)
        second = message.second_stage
        _within(check, "second_stage.depth", second.depth, 0, 500)
        weights = (second.click_weight, second.cart_weight, second.purchase_weight)
        for field, weight in zip(("click_weight", "cart_weight", "purchase_weight"), weights, strict=True):
            _within(check, f"second_stage.{field}", weight, 0, 1000)
        rule_ids = tuple(check.name(f"rule_ids[{n}]", name, "") for n, name in enumerate(message.rule_ids))
        if len(rule_ids) > MAX_RULES or len(set(rule_ids)) < len(rule_ids) or "" in rule_ids:
            check.wrong("rule_ids", f"must be at most {MAX_RULES} ids, each once, none of them empty")
        policies = dict(PLACEMENT_POLICIES)
        if len(message.placement_policies) > MAX_PLACEMENTS:
            check.wrong("placement_policies", f"has more than {MAX_PLACEMENTS} entries")
        named_policies = set()
        for n, entry in enumerate(message.placement_policies[:MAX_PLACEMENTS]):
            path = f"placement_policies[{n}]"
            name = check.name(f"{path}.placement", entry.placement, "")
            if not name or name in named_policies:
                check.wrong(f"{path}.placement", "must be named, and once")
            named_policies.add(name)
            _within(check, f"{path}.default_page_size", entry.default_page_size, 0, 100)
            policies[name] = PlacementPolicy(
                placement=name,
                exclude_owned=entry.exclude_owned,
                unseen_first=entry.unseen_first,
                exclude_in_cart=entry.exclude_in_cart,
                exclude_out_of_stock=entry.exclude_out_of_stock,
                default_page_size=entry.default_page_size or 10,
                filter_text=self._filter(check, f"{path}.filter", entry.filter, required=False),
            )
        check.finish()
        return ServingConfig(
            serving_config_id=config_id,
            display_name=message.display_name,
            scorer=scorer,
            diversity_strength=diversity.strength,
            diversity_depth=diversity.depth or 100,
            diversity_algorithm=algorithm,
            placement_policies=policies,
            cosine_alpha=alpha,
            exploration_slots=message.exploration.slots,
            exploration_probability=message.exploration.probability,
            ranks_again=not second.disabled,
            ranker_depth=second.depth or 100,
            outcome_weights=weights if any(weights) else None,
            rule_ids=rule_ids,
            sources=sources,
            model=named["model"],
            model_alias=named["model_alias"],
            shadow_model_alias=named["shadow_model_alias"],
            built_in=False,
        )

    @staticmethod
    def _sources(
        check: Checker, message: serving_config_pb2.ServingConfig, scorer: Scorer
    ) -> tuple[SourceWeight, ...]:
        if scorer is not Scorer.WEIGHTED_SUM:
            if message.sources:
                check.wrong(
                    "sources",
                    "are those that the scorer implies; leave them out, or send SCORER_WEIGHTED_SUM",
                )
            return ()
        found: list[SourceWeight] = []
        for n, entry in enumerate(message.sources[:MAX_SOURCES]):
            path = f"sources[{n}]"
            _within(check, f"{path}.weight", entry.weight, 0, _MAX_WEIGHT)
            _within(check, f"{path}.candidate_limit", entry.candidate_limit, 0, _MAX_CANDIDATES)
            if entry.source not in _WEIGHED_SOURCES:
                check.wrong(f"{path}.source", "must name a source of candidates")
                continue
            source = Source(entry.source)
            if any(other.source is source for other in found):
                check.wrong(f"{path}.source", "is named twice")
            found.append(SourceWeight(source, entry.weight, entry.candidate_limit or DEFAULT_CANDIDATE_LIMIT))
        if not any(entry.weight > 0 for entry in found) or len(message.sources) > MAX_SOURCES:
            check.wrong("sources", f"must be 1 to {MAX_SOURCES}, one of them with a weight above 0")
        return tuple(found)

    def rehearsal(self, request: pb.RehearseRuleRequest) -> tuple[Rule, str, int]:
        """Returns the draft, the serving config and the most requests; raises as `rule`."""
        check = Checker("")
        rule_id = check.name("rule.rule_id", request.rule.rule_id, "draft")
        serving_config = check.name("serving_config", request.serving_config, "default")
        _within(check, "request_limit", request.request_limit, 0, 10_000)
        check.finish()
        return self.rule(rule_id, request.rule), serving_config, request.request_limit or 1000

    def changed_rule(self, current: Rule, message: rule_pb2.Rule, mask: FieldMask | None) -> Rule:
        """Returns the rule with the fields of the mask, or all that are set, taken from a message."""
        return self.rule(current.rule_id, _merged(rule_of(current), message, mask, "rule_id"))

    def changed_serving_config(
        self, current: ServingConfig, message: serving_config_pb2.ServingConfig, mask: FieldMask | None
    ) -> ServingConfig:
        """As `changed_rule`."""
        merged = _merged(serving_config_of(current), message, mask, "serving_config_id")
        return self.serving_config(current.serving_config_id, merged)

    def encode_config(self, config: ServingConfig) -> bytes:
        return _document(serving_config_of(config))

    def decode_config(self, document_id: str, content: bytes) -> ServingConfig:
        message = _message(serving_config_pb2.ServingConfig(), content)
        _same_id(message.serving_config_id, document_id)
        config = self.serving_config(document_id, message, "")
        return _with_output(config, message)

    def encode_rule(self, rule: Rule) -> bytes:
        return _document(rule_of(rule), {"version": rule.version})

    def decode_rule(self, document_id: str, content: bytes) -> Rule:
        message = _message(rule_pb2.Rule(), content)
        _same_id(message.rule_id, document_id)
        return _with_output(self.rule(document_id, message, ""), message, int(json.loads(content)["version"]))

    def _action(self, check: Checker, message: rule_pb2.Rule) -> Action | None:
        match message.WhichOneof("action"):
            case "pin":
                pins = tuple(
                    (
                        "".join(check.items(f"pin.pins[{n}].item_id", [pin.item_id], 1)),
                        _within(check, f"pin.pins[{n}].position", pin.position, 1, 100),
                    )
                    for n, pin in enumerate(message.pin.pins[: MAX_PINS + 1])
                )
                if not 1 <= len(pins) <= MAX_PINS:
                    check.wrong("pin.pins", f"must have 1 to {MAX_PINS} entries")
                elif len({position for _, position in pins}) < len(pins):
                    check.wrong("pin.pins", "must have distinct positions")
                elif len({item_id for item_id, _ in pins}) < len(pins):
                    check.wrong("pin.pins", "must have distinct items")
                return Pin(pins)
            case "boost":
                amount = self._amount(check, "boost.amount", message.boost.amount)
                return Shift(self._filter(check, "boost.filter", message.boost.filter), amount)
            case "bury":
                amount = self._amount(check, "bury.amount", message.bury.amount)
                return Shift(self._filter(check, "bury.filter", message.bury.filter), -amount)
            case "exclude":
                return Exclude(self._filter(check, "exclude.filter", message.exclude.filter))
            case "cap":
                if message.cap.group_by not in _GROUPS:
                    check.wrong("cap.group_by", "must be brand, category or top category")
                    return None
                limit = _within(check, "cap.limit", message.cap.limit, 1, 100)
                return Cap(GroupBy(message.cap.group_by), int(limit))
            case "minimum_share":
                share = message.minimum_share.share
                if not 0 < share <= 1:
                    check.wrong("minimum_share.share", f"is {share:g}; send more than 0 and at most 1")
                text = self._filter(check, "minimum_share.filter", message.minimum_share.filter)
                return MinimumShare(text, share)
        check.wrong("action", "is not set; set one of pin, boost, bury, exclude, cap, minimum_share")
        return None

    def _filter(self, check: Checker, field: str, text: str, *, required: bool = True) -> str:
        if not text.strip():
            if required:
                check.wrong(field, "is empty; send a filter expression")
            return ""
        with check.catching():
            self._filters.parse(text, check.path(field))
        return text

    @staticmethod
    def _amount(check: Checker, field: str, amount: float) -> float:
        if not 0 < amount <= 10:
            check.wrong(field, f"is {amount:g}; send more than 0 and at most 10")
        return amount


def rule_of(rule: Rule) -> rule_pb2.Rule:
    """Returns the message of a rule."""
    message = rule_pb2.Rule(
        rule_id=rule.rule_id,
        display_name=rule.display_name,
        placements=rule.placements,
        disabled=rule.disabled,
        etag=rule.etag,
    )
    for start, end in rule.active:
        span = message.active_time_ranges.add()
        span.SetInParent()
        _write_time(span.start_time, start)
        _write_time(span.end_time, end)
    _write_time(message.create_time, rule.create_time)
    _write_time(message.update_time, rule.update_time)
    match rule.action:
        case Pin(pins):
            message.pin.pins.extend(
                rule_pb2.PinAction.Pin(item_id=item_id, position=position) for item_id, position in pins
            )
        case Shift(text, amount) if amount > 0:
            message.boost.filter, message.boost.amount = text, amount
        case Shift(text, amount):
            message.bury.filter, message.bury.amount = text, -amount
        case Exclude(text):
            message.exclude.filter = text
        case Cap(group_by, limit):
            message.cap.group_by = int(group_by)  # type: ignore[assignment]
            message.cap.limit = limit
        case MinimumShare(text, share):
            message.minimum_share.filter, message.minimum_share.share = text, share
    return message


def serving_config_of(config: ServingConfig) -> serving_config_pb2.ServingConfig:
    """Returns the message of a serving config."""
    message = serving_config_pb2.ServingConfig(
        serving_config_id=config.serving_config_id,
        display_name=config.display_name,
        scorer=serving_config_pb2.ServingConfig.Scorer.Value(config.scorer.value),
        placement_policies=[
            serving_config_pb2.PlacementPolicy(
                placement=policy.placement,
                exclude_owned=policy.exclude_owned,
                unseen_first=policy.unseen_first,
                exclude_in_cart=policy.exclude_in_cart,
                exclude_out_of_stock=policy.exclude_out_of_stock,
                default_page_size=policy.default_page_size,
                filter=policy.filter_text,
            )
            for policy in config.placement_policies.values()
        ],
        rule_ids=config.rule_ids,
        sources=[
            serving_config_pb2.SourceWeight(
                source=int(entry.source),  # type: ignore[arg-type]
                weight=entry.weight,
                candidate_limit=entry.candidate_limit,
            )
            for entry in config.sources
        ],
        model=config.model or "main",
        model_alias=config.model_alias or "production",
        shadow_model_alias=config.shadow_model_alias,
        built_in=config.built_in,
        version=config.version,
        etag=config.etag,
    )
    if config.scorer is Scorer.COSINE:
        message.cosine_alpha = config.cosine_alpha
    if config.exploration_slots or config.exploration_probability:
        message.exploration.slots = config.exploration_slots
        message.exploration.probability = config.exploration_probability
    if config.diversity_strength > 0:
        message.diversity.CopyFrom(
            serving_config_pb2.Diversity(
                algorithm=serving_config_pb2.Diversity.Algorithm.Value(config.diversity_algorithm.value),
                strength=config.diversity_strength,
                depth=config.diversity_depth,
            )
        )
    message.second_stage.disabled = not config.ranks_again
    message.second_stage.depth = config.ranker_depth
    if config.outcome_weights is not None:
        second = message.second_stage
        second.click_weight, second.cart_weight, second.purchase_weight = config.outcome_weights
    _write_time(message.create_time, config.create_time)
    _write_time(message.update_time, config.update_time)
    return message


def _write_time(message: Timestamp, seconds: float | None) -> None:
    if seconds is not None:
        message.CopyFrom(timestamp_of(seconds))
        message.SetInParent()


def _merged(current: _M, sent: _M, mask: FieldMask | None, id_field: str) -> _M:
    fixed = _OUTPUT_ONLY | {id_field, "etag"}
    merged = type(current)()
    merged.CopyFrom(current)
    if mask is None or not mask.paths:
        for field, _ in sent.ListFields():
            if field.name not in fixed:
                merged.ClearField(field.name)
                part = type(current)()
                value: Any = getattr(sent, field.name)
                if field.is_repeated:
                    getattr(part, field.name).extend(value)
                elif field.type == field.TYPE_MESSAGE:
                    getattr(part, field.name).CopyFrom(value)
                else:
                    setattr(part, field.name, value)
                merged.MergeFrom(part)
        return merged
    check = Checker("")
    known = FieldMask()
    for n, path in enumerate(mask.paths):
        if not FieldMask(paths=[path]).IsValidForDescriptor(current.DESCRIPTOR):  # type: ignore[arg-type]
            check.wrong(f"update_mask.paths[{n}]", f"{path!r} is no field of {current.DESCRIPTOR.name}")
        elif path.split(".")[0] in fixed:
            check.wrong(f"update_mask.paths[{n}]", f"{path!r} cannot be changed")
        else:
            known.paths.append(path)
    check.finish()
    known.MergeMessage(sent, merged, replace_message_field=True, replace_repeated_field=True)
    return merged


def _document(message: Message, more: dict[str, Any] | None = None) -> bytes:
    content = json_format.MessageToDict(message, preserving_proto_field_name=True)
    document = {"schema": SCHEMA, **(more or {}), "content": content}
    return json.dumps(document, ensure_ascii=False, indent=1, sort_keys=True).encode()


def _message(message: _M, content: bytes) -> _M:
    document = json.loads(content)
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"it is no document of schema {SCHEMA}")
    json_format.ParseDict(document["content"], message)
    return message


def _same_id(named: str, document_id: str) -> None:
    if named != document_id:
        raise ValueError(f"it describes {named!r}, and its name says {document_id!r}")


def _with_output(resource: Any, message: Any, version: int | None = None) -> Any:
    def seconds(field: str) -> float | None:
        time = getattr(message, field)
        return time.seconds + time.nanos * 1e-9 if message.HasField(field) else None

    return replace(
        resource,
        version=message.version if version is None else version,
        etag=message.etag,
        create_time=seconds("create_time"),
        update_time=seconds("update_time"),
    )


def _display_name(check: Checker, value: str) -> None:
    if len(value) > MAX_DISPLAY_NAME:
        check.wrong("display_name", f"has {len(value)} characters; the most is {MAX_DISPLAY_NAME}")


def _within(check: Checker, field: str, value: _N, low: float, high: float) -> _N:
    if not (math.isfinite(value) and low <= value <= high):
        check.wrong(field, f"is {value:g}; send {low:g} to {high:g}")
    return value


def _enum_name(enum: Any, value: int) -> str:
    try:
        return str(enum.Name(value))
    except ValueError:
        return ""
