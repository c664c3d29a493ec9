"""Named sizes of the model. A size is a starting point; a run may depart from it field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from shared.errors import FieldViolation, InvalidInput


@dataclass(frozen=True, slots=True)
class HyperParameters:
    """Everything that shapes the model and its training. See the proto for each range.

    Attributes:
        dimension: D, width of the item vectors.
        blocks, heads: of the Transformer.
        max_history: L, tokens of a packed row, events that the encoder sees.
        dropout: rate.
        negatives: shared negatives of the sampled softmax.
        learning_rate, warmup_steps: of Adam.
        max_epochs: passes over the data at most.
        patience: training ends after so many passes without a better NDCG@10.
        targets: items after each event that it learns to foretell.
        target_decay: weight of each of them relative to the one before.
        batch_tokens: tokens of a step.
        cooccurrence_window: events that the companion counts back.
        filter_share: share of the causal filter in a block's mixing.
        max_train_seconds: wall time of training, not of the run.
    """

    dimension: int = 128
    blocks: int = 1
    heads: int = 2
    max_history: int = 64
    dropout: float = 0.5
    negatives: int = 1024
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    max_epochs: int = 200
    patience: int = 10
    targets: int = 3
    target_decay: float = 0.3
    batch_tokens: int = 2048
    cooccurrence_window: int = 50
    filter_share: float = 0.7
    max_train_seconds: int = 600

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise _invalid(name, f"must be in [{low}, {high}], not {value}")
        if self.dimension % (2 * self.heads):
            raise _invalid("dimension", f"must be a multiple of twice heads ({2 * self.heads})")
        if self.batch_tokens < self.max_history:
            raise _invalid("batch_tokens", f"must hold one history of {self.max_history} events")

    def to_json(self) -> dict[str, float | int]:
        """Returns the fields by name."""
        return asdict(self)

    @property
    def rows_per_step(self) -> int:
        """Packed rows of a step."""
        return self.batch_tokens // self.max_history


RANGES: dict[str, tuple[float, float]] = {
    "dimension": (4, 4096),
    "blocks": (1, 48),
    "heads": (1, 64),
    "max_history": (2, 2048),
    "dropout": (0.0, 0.9),
    "negatives": (1, 65536),
    "learning_rate": (1e-9, 1.0),
    "warmup_steps": (0, 1_000_000),
    "max_epochs": (1, 1000),
    "patience": (1, 1000),
    "batch_tokens": (64, 1 << 20),
    "targets": (1, 10),
    "target_decay": (0.0, 1.0),
    "cooccurrence_window": (1, 500),
    "filter_share": (0.0, 1.0),
    "max_train_seconds": (1, 604_800),
}

SIZES: dict[str, HyperParameters] = {
    "tiny": HyperParameters(
        dimension=16, max_history=32, dropout=0.2, negatives=128, batch_tokens=512, warmup_steps=10,
        max_epochs=60, learning_rate=3e-3, max_train_seconds=15,
    ),
    "small": HyperParameters(),
    "base": HyperParameters(
        dimension=256, blocks=2, heads=4, max_history=128, negatives=4096, batch_tokens=8192,
        max_epochs=100, max_train_seconds=3600,
    ),
    # 12 * 1024^2 weights a block: 9 blocks hold 113 million, beside the item table. With its gradient and Adam that is
    # 1.8 GB; a step of 65,536 tokens needs 6 * 65,536 * 1.13e8 = 45 TFLOP.
    "large": HyperParameters(
        dimension=1024, blocks=9, heads=16, max_history=256, dropout=0.2, negatives=16384,
        batch_tokens=65536, warmup_steps=2000, max_epochs=100, max_train_seconds=86_400,
    ),
}  # fmt: skip


def resolve(size: str, overrides: Mapping[str, float | int]) -> HyperParameters:
    """Returns a named size with departures from it.

    Raises:
        InvalidInput: there is no such size, or a field is out of its range.
    """
    if size not in SIZES:
        raise _invalid("size", f"must be one of {', '.join(SIZES)}, not {size!r}")
    known = HyperParameters.__dataclass_fields__
    for name in overrides:
        if name not in known:
            raise _invalid(name, "is no hyper-parameter")
    return replace(SIZES[size], **overrides)  # type: ignore[arg-type]


def _invalid(name: str, problem: str) -> InvalidInput:
    field = "config.size" if name == "size" else f"config.overrides.{name}"
    return InvalidInput("INVALID_REQUEST", f"{field} {problem}.", {}, [FieldViolation(field, f"{problem}.")])
