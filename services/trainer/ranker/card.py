"""What the model card says of the second stage."""

from __future__ import annotations

from services.trainer.pipeline.card import png, pyplot
from services.trainer.ranker.build import JudgedRanker
from services.trainer.ranker.measuring import reliability
from shared.bundle.ranker import TASKS

CHART = "second_stage_reliability.png"
_NAMES = {"click": "click", "cart": "cart addition", "purchase": "purchase"}


def draw_reliability(judged: JudgedRanker, label: str = "") -> bytes:
    """Returns a PNG of how often each outcome came about against how probable it was held, where the items stood."""
    assert judged.judged is not None
    assert judged.probabilities_NT is not None
    plt = pyplot()
    figure, axes = plt.subplots(1, len(TASKS), figsize=(9, 3.2), dpi=110)
    for t, (task, axis) in enumerate(zip(TASKS, axes, strict=True)):
        predicted, observed, _ = reliability(
            judged.probabilities_NT[:, t], judged.judged.labels_NT[:, t] > 0, bins=10
        )
        top = max(float(predicted.max()), float(observed.max()), 1e-4) * 1.05
        axis.plot([0, top], [0, top], color="tab:grey", linestyle=":")
        axis.plot(predicted, observed, "o-", color="tab:blue")
        axis.set_title(f"{_NAMES[task]}: error {judged.measures[f'{task}_ece']:.4f}", fontsize=9)
        axis.set_xlabel("mean probability")
    axes[0].set_ylabel("share that did")
    return png(figure, label)


def section(judged: JudgedRanker) -> str:
    """Returns the card's section in Markdown."""
    lines = ["## Second stage", ""]
    facts = judged.facts
    if judged.served:
        lead, base = judged.lead, judged.baseline
        lines.append(
            f"**Served.** On {facts['judged_pages']:,} later pages its order would have earned {lead.value:+.4f} a page "
            f"[{lead.low:+.4f}, {lead.high:+.4f}] over the first stage's {base:.4f} (a click counts 1, a cart addition "
            "3, a purchase 10 more), valued with the chance that a place is looked at."
        )
    else:
        lines.append(f"**None: {judged.why_not}.** The order is the first stage's.")
    if facts:
        lines += [
            "",
            f"Logged since the version it was taught on: {facts['impressions']:,} impressions on {facts['pages']:,} pages "
            f"to {facts['people']:,} people; {facts['click']:,} clicks, {facts['cart']:,} cart additions, "
            f"{facts['purchase']:,} purchases.",
        ]
    if judged.weights is not None:
        measures = judged.measures
        lines += [
            "",
            "| | AUC | log-loss | calibration error | before calibration |",
            "|---|---|---|---|---|",
            *(
                f"| {_NAMES[task]} | {measures[f'{task}_auc']:.4f} | {measures[f'{task}_log_loss']:.4f} "
                f"| {measures[f'{task}_ece']:.4f} | {measures[f'{task}_ece_uncalibrated']:.4f} |"
                for task in TASKS
            ),
            "",
            f"NDCG@10 with outcomes weighted for where they happened: {measures['ndcg@10_ranker']:.4f}; the first "
            f"stage's order {measures['ndcg@10_first_stage']:.4f}, as shown {measures['ndcg@10_as_shown']:.4f}. The "
            f"tenth place is looked at {facts['examination_at_10']:.2f} times as often as the first.",
            "",
            f"![reliability of the second stage]({CHART})",
        ]
    return "\n".join([*lines, ""])


def with_section(card: bytes, judged: JudgedRanker) -> bytes:
    """Returns a card with the section before what it says of training."""
    text, own = card.decode(), section(judged)
    before, mark, after = text.partition("\n## Training\n")
    return f"{before}\n{own}{mark}{after}".encode() if mark else f"{text}\n{own}".encode()


def is_simulated(card: bytes) -> bool:
    """Returns whether a card says that its shoppers are made up."""
    return b"SIMULATION" in card
