"""Answers to messages."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from shopkeeper.recommend.v1 import recommend_service_pb2 as pb
from shopkeeper.recommend.v1 import recommendation_pb2

from services.recommend.domain.embedding import UserEmbedding
from services.recommend.domain.recommendation import (
    Answer,
    Degradation,
    Explanation,
    Freshness,
    Reason,
    SecondStageScore,
)
from services.recommend.domain.rehearsal import Rehearsal
from services.recommend.domain.status import ModelState, ServiceStatus
from shared.tokens import TokenSigner


def response_of(answer: Answer, signer: TokenSigner, next_page_token: str) -> pb.RecommendResponse:
    """Returns the message of an answer, its attribution token signed."""
    return pb.RecommendResponse.FromString(wire_response_of(answer, signer, next_page_token))


def wire_response_of(answer: Answer, signer: TokenSigner, next_page_token: str) -> bytes:
    """Returns the serialised message of an answer: as `response_of`, and several times cheaper.

    Records were serialised when the catalogue told of them, and are spliced in. What follows
    concatenated on the wire is merged, so head and items may be written apart.
    """
    head = pb.RecommendResponse(
        attribution_token=answer.attribution.sign(signer), next_page_token=next_page_token
    )
    write_freshness(head.freshness, answer.freshness)
    for degradation in answer.degraded:
        head.degraded.append(degradation_of(degradation))
    if answer.stages:
        head.trace.CopyFrom(trace_of(answer))
    parts = [
        head.SerializeToString(),
        _wire_model(
            answer.model_name,
            answer.model_version,
            answer.config.serving_config_id,
            answer.variant,
            answer.catalog_version,
        ),
    ]
    id_of, records = answer.index.id_of, answer.records
    further = answer.reasons or answer.purchase_counts_K is not None or answer.expected_K is not None
    ends = _ends_of(answer)
    size = len(ends) // max(1, len(answer.rows_K))
    for k, row in enumerate(answer.rows_K.tolist()):
        record = records[k] if records else None
        if isinstance(record, bytes):
            front = record
        else:
            item_id = id_of(row).encode()
            front = b"\x0a" + _varint(len(item_id)) + item_id
        end = ends[k * size : (k + 1) * size]
        if further:
            end += _further(answer, k).SerializeToString()
        parts += (_item_head(len(front) + len(end)), front, end)
    return b"".join(parts)


_END = {
    width: np.dtype(
        [
            ("tag_2", "u1"),
            ("score", "<f8"),
            ("tag_6", "u1"),
            ("propensity", "<f4"),
            ("tag_5", "u1"),
            ("position", width),
        ]
    )
    for width in ("u1", "<u2")
}


def _ends_of(answer: Answer) -> bytes:
    """Returns fields 2, 6 and 5 of every item, one after the other: a double, a float, a number below 2**14."""
    count, first = len(answer.rows_K), answer.first_position
    wide = first + count > 0x80
    ends_K = np.empty(count, _END["<u2" if wide else "u1"])
    ends_K["tag_2"], ends_K["tag_6"], ends_K["tag_5"] = 0x11, 0x35, 0x28
    ends_K["score"], ends_K["propensity"] = answer.scores_K, answer.attribution.propensities_K
    position_K = np.arange(first, first + count)
    # A varint of two bytes: seven bits, the mark that more follows, seven bits.
    ends_K["position"] = (position_K & 0x7F) | 0x80 | (position_K >> 7 << 8) if wide else position_K
    return ends_K.tobytes()


@functools.lru_cache(maxsize=16_384)
def _item_head(length: int) -> bytes:
    """Returns the tag and the length before an item."""
    return b"\x0a" + _varint(length)


def _further(answer: Answer, k: int) -> recommendation_pb2.RecommendedItem:
    item = recommendation_pb2.RecommendedItem()
    if answer.reasons:
        item.reasons.extend(reason_of(reason) for reason in answer.reasons[k])
    if answer.purchase_counts_K is not None:
        item.purchase_count = int(answer.purchase_counts_K[k])
    if answer.expected_K is not None and not math.isnan(answer.expected_K[k]):
        item.expected_time.CopyFrom(timestamp_of(float(answer.expected_K[k])))
    return item


def _varint(number: int) -> bytes:
    if number < 0x80:
        return _SMALL[number]
    written = bytearray()
    while number >= 0x80:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)


_SMALL = [bytes([number]) for number in range(0x80)]


@functools.lru_cache(maxsize=256)
def _wire_model(name: str, version: str, serving_config: str, variant: str, catalog_version: int) -> bytes:
    info = recommendation_pb2.ModelInfo(
        name=name,
        version=version,
        serving_config=serving_config,
        variant=variant,
        catalog_version=catalog_version,
    )
    return pb.RecommendResponse(model=info).SerializeToString()


def model_info_of(answer: Answer) -> recommendation_pb2.ModelInfo:
    """Returns which model and configuration made an answer."""
    return recommendation_pb2.ModelInfo(
        name=answer.model_name,
        version=answer.model_version,
        serving_config=answer.config.serving_config_id,
        variant=answer.variant,
        catalog_version=answer.catalog_version,
    )


def explanation_of(explanation: Explanation) -> pb.ExplainResponse:
    """Returns the message of an explanation."""
    answer = explanation.answer
    return pb.ExplainResponse(
        recommended=explanation.recommended,
        position=explanation.position,
        position_by_score=explanation.position_by_score,
        score=explanation.score,
        page_threshold_score=explanation.page_threshold_score,
        source_scores=[
            pb.ExplainResponse.SourceScore(
                source=int(entry.source),  # type: ignore[arg-type]
                score=entry.score,
                contribution=entry.contribution,
                rank=entry.rank,
            )
            for entry in explanation.source_scores
        ],
        verdicts=[int(verdict) for verdict in explanation.verdicts],  # type: ignore[misc]
        reasons=[reason_of(reason) for reason in explanation.reasons],
        findings=explanation.findings,
        rule_ids=explanation.rule_ids,
        second_stage=None if explanation.second_stage is None else _second_stage_of(explanation.second_stage),
        trace=trace_of(answer),
        model=model_info_of(answer),
        degraded=[degradation_of(degradation) for degradation in answer.degraded],
        freshness=freshness_of(answer.freshness),
    )


def _second_stage_of(second: SecondStageScore) -> pb.ExplainResponse.SecondStage:
    return pb.ExplainResponse.SecondStage(
        first_stage_score=second.first_stage_score,
        first_stage_position=second.first_stage_position,
        position=second.position,
        click_probability=second.click_probability,
        cart_probability=second.cart_probability,
        purchase_probability=second.purchase_probability,
    )


def reason_of(reason: Reason) -> recommendation_pb2.Reason:
    """Returns the message of a reason."""
    message = recommendation_pb2.Reason(
        kind=int(reason.kind),  # type: ignore[arg-type]
        source_item_id=reason.source_item_id,
        source_event_kind=reason.source_event_kind,  # type: ignore[arg-type]
        contribution=reason.contribution,
        text=reason.text,
        rule_id=reason.rule_id,
        segment_id=reason.segment_id,
    )
    if reason.source_event_time is not None:
        message.source_event_time.CopyFrom(timestamp_of(reason.source_event_time))
    return message


def degradation_of(degradation: Degradation) -> recommendation_pb2.Degradation:
    """Returns the message of a degradation."""
    return recommendation_pb2.Degradation(cause=int(degradation.cause), text=degradation.text)  # type: ignore[arg-type]


def freshness_of(freshness: Freshness) -> recommendation_pb2.Freshness:
    """Returns the message of a freshness."""
    message = recommendation_pb2.Freshness()
    write_freshness(message, freshness)
    return message


def write_freshness(message: recommendation_pb2.Freshness, freshness: Freshness) -> None:
    """Writes a freshness into its message."""
    message.watermark = freshness.watermark
    message.events_used = freshness.events_used
    for time, written in (
        (freshness.watermark_time, message.watermark_time),
        (freshness.newest_event_time, message.newest_event_time),
        (freshness.catalog_time, message.catalog_time),
    ):
        if time is not None:
            seconds, nanos = _seconds_and_nanos(time)
            written.seconds, written.nanos = seconds, nanos
            # A time of 0 is a time all the same.
            written.SetInParent()


def trace_of(answer: Answer) -> recommendation_pb2.Trace:
    """Returns the message of an answer's trace."""
    return recommendation_pb2.Trace(
        stages=[
            recommendation_pb2.Trace.Stage(
                name=stage.name,
                duration_micros=round(stage.seconds * 1e6),
                candidates_in=stage.candidates_in,
                candidates_out=stage.candidates_out,
                detail=stage.detail,
            )
            for stage in answer.stages
        ],
        verdicts=[
            recommendation_pb2.VerdictCount(verdict=int(verdict), items=items)  # type: ignore[arg-type]
            for verdict, items in answer.verdict_counts
        ],
        sources=[int(source) for source in answer.sources],  # type: ignore[misc]
    )


def timestamp_of(seconds: float) -> Timestamp:
    """Returns the message of a time in seconds since 1970, held within the years 1 to 9999."""
    whole, nanos = _seconds_and_nanos(seconds)
    return Timestamp(seconds=whole, nanos=nanos)


def _seconds_and_nanos(seconds: float) -> tuple[int, int]:
    seconds = min(max(seconds, -62135596800.0), 253402300799.0)
    whole = math.floor(seconds)
    return whole, min(int((seconds - whole) * 1e9), 999_999_999)


def rehearsal_of(rehearsal: Rehearsal) -> pb.RehearseRuleResponse:
    """Returns the message of a rehearsal."""
    response = pb.RehearseRuleResponse(
        requests_replayed=rehearsal.requests_replayed, requests_changed=rehearsal.requests_changed
    )
    for item_id, before, after in rehearsal.displacements:
        response.displacements.add(item_id=item_id, shown_before=before, shown_after=after)
    for estimate, written in ((rehearsal.clicks, response.clicks), (rehearsal.revenue, response.revenue)):
        written.change, written.low, written.high = estimate.change, estimate.low, estimate.high
    return response


def _served_model_of(state: ModelState) -> pb.GetModelStatusResponse.ServedModel:
    served = pb.GetModelStatusResponse.ServedModel(
        model=state.model_name,
        alias=state.alias,
        version=state.version,
        item_count=state.item_count,
        dimension=state.dimension,
        max_history=state.max_history,
        swap_count=state.swap_count,
    )
    if state.created_time is not None:
        served.create_time.CopyFrom(timestamp_of(state.created_time))
    if state.loaded_time is not None:
        served.load_time.CopyFrom(timestamp_of(state.loaded_time))
    return served


def status_of(status: ServiceStatus) -> pb.GetModelStatusResponse:
    """Returns the message of the service's state."""
    response = pb.GetModelStatusResponse(
        models=[_served_model_of(state) for state in status.models],
        degraded=[degradation_of(degradation) for degradation in status.degraded],
        start_time=timestamp_of(status.start_time),
    )
    for refusal in (refusal for state in status.models for refusal in state.refused):
        response.refused.add(
            model=refusal.model,
            version=refusal.version,
            reason=refusal.reason,
            text=refusal.text,
            refuse_time=timestamp_of(refusal.time),
        )
    for stream in status.streams:
        message = response.streams.add(
            name=stream.name,
            connected=stream.connected,
            watermark=stream.watermark,
            entries=stream.entries,
            last_error=stream.last_error,
            complete=stream.complete,
        )
        if stream.last_message_time is not None:
            message.last_message_time.CopyFrom(timestamp_of(stream.last_message_time))
    return response


def embeddings_of(version: str, embeddings: Sequence[UserEmbedding]) -> pb.EmbedUsersResponse:
    """Returns the message of shoppers as vectors."""
    return pb.EmbedUsersResponse(
        model_version=version,
        embeddings=[
            pb.UserEmbedding(
                values=[] if one.query_D is None else one.query_D.tolist(), event_count=one.event_count
            )
            for one in embeddings
        ],
    )
