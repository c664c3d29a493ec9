"""Page tokens."""

from __future__ import annotations

from datetime import datetime

from services.trainer.domain.runs import TrainingRun
from shared.errors import FieldViolation, InvalidInput
from shared.tokens import TokenSigner


def sign_run_page(signer: TokenSigner, run: TrainingRun) -> str:
    """Returns the token of the page after a run."""
    return signer.sign("page", f"runs|{run.created_at.isoformat()}|{run.run_id}".encode())


def read_run_page(signer: TokenSigner, token: str) -> tuple[datetime, str] | None:
    """Returns where a page of runs starts; None for the first."""
    if not token:
        return None
    created_at, run = _page_parts(signer, token, "runs", 2)
    return datetime.fromisoformat(created_at), run


def sign_name_page(signer: TokenSigner, kind: str, name: str) -> str:
    """Returns the token of the page after a name; `kind` keeps lists apart."""
    return signer.sign("page", f"{kind}|{name}".encode())


def read_name_page(signer: TokenSigner, kind: str, token: str) -> str:
    """Returns the name after which a page starts; empty for the first."""
    return _page_parts(signer, token, kind, 1)[0] if token else ""


def _page_parts(signer: TokenSigner, token: str, kind: str, count: int) -> list[str]:
    parts = signer.verify("page", token, "page_token").decode().split("|")
    if parts[0] != kind or len(parts) != count + 1:
        problem = "belongs to another list; send one back to the call that gave it."
        raise InvalidInput(
            "INVALID_REQUEST", f"page_token {problem}", {}, [FieldViolation("page_token", problem)]
        )
    return parts[1:]
