"""`shopkeeper recommend`, `explain` and `metrics`."""

from __future__ import annotations

from collections.abc import Sequence

from shopkeeper.feedback.v1 import feedback_service_pb2, metrics_pb2
from shopkeeper.profile.v1 import item_pb2
from shopkeeper.recommend.v1 import recommend_service_pb2, recommendation_pb2

from shared.cli.clients import Clients
from shared.cli.output import message_dict, say, show_json, show_table

CALL_TIMEOUT_SECONDS = 10.0


def price_text(item: item_pb2.Item) -> str:
    """Returns the price for people, or ""."""
    if not item.HasField("price_micros"):
        return ""
    return f"{item.price_micros / 1e6:,.2f} {item.currency_code}"


def reason_text(reasons: Sequence[recommendation_pb2.Reason]) -> str:
    """Returns the first reason as a sentence."""
    for reason in reasons:
        if reason.text:
            return reason.text
        name = (
            recommendation_pb2.Reason.Kind.Name(reason.kind).removeprefix("KIND_").replace("_", " ").lower()
        )
        return f"{name} {reason.source_item_id}".strip()
    return ""


def degradation_text(degraded: Sequence[recommendation_pb2.Degradation]) -> str:
    """Returns what an answer went without, or ""."""
    return "; ".join(
        d.text or recommendation_pb2.Degradation.Cause.Name(d.cause).removeprefix("CAUSE_").lower()
        for d in degraded
    )


def show_recommendations(
    answer: recommend_service_pb2.RecommendResponse, user: str, *, as_json: bool
) -> None:
    """Prints the items of an answer with their reasons."""
    if as_json:
        show_json(answer)
        return
    rows = [
        (
            i + 1,
            item.item_id,
            item.item.title,
            price_text(item.item),
            f"{item.score:.3f}",
            reason_text(item.reasons),
        )
        for i, item in enumerate(answer.items)
    ]
    note = f"Went without: {degradation_text(answer.degraded)}" if answer.degraded else ""
    show_table(
        f"For {user}: {answer.model.serving_config or 'default'}, model {answer.model.version or 'none'}",
        ("#", "item", "title", "#price", "#score", "why"), rows, note=note,
    )  # fmt: skip


def show_explanation(
    answer: recommend_service_pb2.ExplainResponse, user: str, item_id: str, *, as_json: bool
) -> None:
    """Prints why an item is recommended, or why not."""
    if as_json:
        show_json(answer)
        return
    where = f"position {answer.position}" if answer.recommended else "not on the page"
    say(f"{item_id} for {user}: {where}; by score alone position {answer.position_by_score}, score {answer.score:.3f}"
        f" (the page's last item has {answer.page_threshold_score:.3f})")  # fmt: skip
    rows = [
        (recommendation_pb2.CandidateSource.Name(s.source).removeprefix("CANDIDATE_SOURCE_").lower(), s.rank or "",
         f"{s.score:.4f}", f"{s.contribution:+.4f}")
        for s in answer.source_scores
    ]  # fmt: skip
    if rows:
        show_table("What each source says", ("source", "#rank", "#score", "#contribution"), rows)
    for reason in answer.reasons:
        say(f"  because: {reason_text([reason])} ({reason.contribution:+.4f})")
    for verdict in answer.verdicts:
        name = (
            recommendation_pb2.FilterVerdict.Name(verdict).removeprefix("FILTER_VERDICT_").replace("_", " ")
        )
        say(f"  filter: {name.lower()}")
    for finding in answer.findings:
        say(f"  {finding}")


def show_metrics(metrics: metrics_pb2.Metrics, *, as_json: bool, label: str = "") -> None:
    """Prints online metrics by serving config, under a label such as "SIMULATION: "."""
    if as_json:
        show_json({**({"label": label.rstrip(": ")} if label else {}), **message_dict(metrics)})
        return
    rows = []
    for row in sorted(metrics.rows, key=lambda row: row.serving_config):
        money = "; ".join(f"{_money(r.revenue_per_mille)} {r.currency_code}" for r in row.revenues)
        rows.append(
            (row.serving_config or "(all)", f"{row.impression_count:,}", f"{row.click_count:,}",
             _estimate(row.click_through_rate), _estimate(row.add_to_cart_rate), _estimate(row.conversion_rate), money)
        )  # fmt: skip
    show_table(
        f"{label}Online, by serving config",
        ("serving config", "#impressions", "#clicks", "#click-through rate", "#to cart", "#conversion",
         "#revenue per 1,000"), rows,
        note=f"{metrics.confidence_level:.0%} intervals." + ("" if rows else " No impressions in this range."),
    )  # fmt: skip


def _estimate(estimate: metrics_pb2.Estimate) -> str:
    return f"{estimate.value:.4f} [{estimate.lower:.4f}, {estimate.upper:.4f}]"


def _money(estimate: metrics_pb2.Estimate) -> str:
    return f"{estimate.value:,.0f} [{estimate.lower:,.0f}, {estimate.upper:,.0f}]"


def metrics_by_serving_config(clients: Clients, start_seconds: float | None = None) -> metrics_pb2.Metrics:
    """Returns feedback's online metrics, split by serving config, since a time (default: seven days)."""
    request = feedback_service_pb2.GetMetricsRequest(group_by=[metrics_pb2.METRIC_DIMENSION_SERVING_CONFIG])
    if start_seconds is not None:
        request.start_time.FromMilliseconds(int(start_seconds * 1_000))
    return clients.feedback.GetMetrics(request, timeout=30.0)
