"""The model card of a private version. It holds nothing of people that is not noisy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.trainer.pipeline.card import gate_table
from services.trainer.pipeline.gate import Verdict
from services.trainer.privacy.measuring import NoisyMeasures
from shared.ranking_metrics import Interval

_WHERE = {
    "COUNTS": "Noisy counts of what follows what, from contributions of bounded norm, over likeness by the catalogue",
    "GRADIENTS": "A causal Transformer trained on clipped, noisy gradients (DP-Adam)",
}


def write_private_card(
    *,
    model: str,
    promise: Mapping[str, Any],
    measured: NoisyMeasures,
    verdict: Verdict,
    item_count: int,
    hyper_parameters: Mapping[str, Any],
    simulated: bool,
) -> str:
    """Returns the card in Markdown."""
    useful = measured.lead.low > 0
    lines = [f"# Model card: {model}, with differential privacy", ""]
    if simulated:
        lines += ["**SIMULATION: the shoppers are made up. The numbers say nothing about people.**", ""]
    lines += [
        f"**Gate: {verdict.verdict}.** {_WHERE[promise['mechanism']]}. Input: pseudonymous histories of people who "
        "consented to training; no raw user id was read.",
        "",
        "## Privacy",
        "",
        promise["statement"],
        "",
        "| | |",
        "|---|---|",
        f"| epsilon | {promise['epsilon']:.4g} |",
        f"| delta | {promise['delta']:g} |",
        f"| unit | {promise['unit']} |",
        f"| adjacency | {promise['adjacency']} |",
        f"| mechanism | {promise['mechanism']} |",
        f"| noise multiplier | {promise['noise_multiplier']:.4g} (standard deviation over the norm of a person) |",
        f"| sampling rate | {promise['sampling_rate']:g} (Poisson) |",
        f"| steps | {promise['steps']} |",
        f"| clipping norm | {promise['clip_norm']:g} |",
        "",
        "**Covered**: every file of this version. Items and attributes are those of the catalogue; co-occurrence, "
        "popularity, also the one that serves those without a history, and the numbers below carry noise. What weight "
        "likeness by the catalogue has was chosen with noise, on people of their own; every other hyper-parameter is a "
        "public constant. One person's share is clipped to the norm above before anything is added up. The mechanism was "
        "chosen by the caller, who needs no data for that.",
        "",
        "**Not covered**: other versions (the ledger, GetPrivacyBudget, adds those up), versions trained without privacy, "
        "the live histories from which recommendations are made, and counts by a catalogue that itself tells of people, "
        "such as made-to-order items. Nothing was compared with a version in service. When the run took place and how "
        "long it took is seen by whoever may list runs. Noise is of double precision, rounded for counts to 2^-20 of the "
        "clipping norm; for gradients it is not discrete (Mironov, 2012).",
        "",
        "## Gate",
        "",
        *gate_table(verdict),
        "",
        "## Quality",
        "",
        f"The last event of about {measured.people:,.0f} people whom training never read; every item of the catalogue "
        f"competes. 95% intervals of sampling and of the noise (standard deviation {measured.noise:.3g} of each sum).",
        "",
        "| | hr@10 | ndcg@10 |",
        "|---|---|---|",
        f"| served | {_cell(measured.served['hr@10'])} | {_cell(measured.served['ndcg@10'])} |",
        f"| private popularity | {_cell(measured.popularity['hr@10'])} | {_cell(measured.popularity['ndcg@10'])} |",
        "",
    ]
    if not useful:
        lines += [
            "**Nothing useful is shown to have survived the noise**: what is served is not better than popularity by "
            "the interval. So few people, or so small an epsilon, cannot be had together with quality; more people "
            "help, since each adds as much signal and the noise stays as it is.",
            "",
        ]
    lines += ["## Data", "", "| | |", "|---|---|", f"| items of the catalogue | {item_count:,} |", ""]
    lines += ["## Hyper-parameters", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in hyper_parameters.items()]
    return "\n".join([*lines, ""])


def _cell(interval: Interval) -> str:
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
