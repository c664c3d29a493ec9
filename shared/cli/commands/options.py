"""Options that more than one command takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

# How long a command waits for one answer.
CALL_TIMEOUT_SECONDS = 30.0

# typer reads these at run time, so they are Optional[...] rather than a postponed `X | None`.
HomeOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--home", help="Home directory. Default: SHOPKEEPER_HOME, else ./.shopkeeper.", show_default=False
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout for programs.")]
FirstPortOption = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--first-port", min=1024, max=65_000, show_default=False,
        help="Use four ports from this one on (metrics 100 higher). Default: 7001, or SHOPKEEPER_*_ADDRESS.",
    ),
]  # fmt: skip
ModelOption = Annotated[str, typer.Option("--model", help="Model name. Default: main.", show_default=False)]
AliasOption = Annotated[str, typer.Option("--alias", help="Alias to change.")]
CommentOption = Annotated[str, typer.Option("--comment", help="Why; kept in the alias's history.")]
