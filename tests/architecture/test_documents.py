"""The documents say what the code does, in both languages, and point at nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from services.feedback.settings import FeedbackSettings
from shared.settings import ServiceSettings

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    p for p in [*REPOSITORY.glob("*.md"), *REPOSITORY.joinpath("docs").rglob("*.md")] if p.is_file()
)


def code_blocks(path: Path) -> list[str]:
    """Returns the fenced blocks of a document without comments, which are translated."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(r" +# .*", "", block) for block in blocks]


def test_both_readmes_show_the_same_commands_and_code() -> None:
    assert code_blocks(REPOSITORY / "README.md") == code_blocks(REPOSITORY / "README.zh-CN.md")


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_names_every_setting_that_all_services_share(name: str) -> None:
    text = (REPOSITORY / name).read_text()
    expanded = text.replace(
        "SHOPKEEPER_{FEEDBACK,PROFILE,TRAINER,RECOMMEND}_ADDRESS",
        " ".join(
            f"SHOPKEEPER_{service}_ADDRESS" for service in ("FEEDBACK", "PROFILE", "TRAINER", "RECOMMEND")
        ),
    )
    own_names = {"database_url": "DATABASE_URL", "otlp_endpoint": "OTEL_EXPORTER_OTLP_ENDPOINT"}
    variables = {
        own_names.get(field, f"SHOPKEEPER_{field.upper()}") for field in ServiceSettings.model_fields
    }
    assert {
        variable for variable in variables if f"`{variable}`" not in expanded and variable not in expanded
    } == set()


def test_the_page_of_feedback_has_every_setting_with_its_default() -> None:
    text = (REPOSITORY / "docs" / "feedback.md").read_text()
    for name, field in FeedbackSettings.model_fields.items():
        if name in FeedbackSettings.__annotations__:
            default = "<home>/imports" if field.default is None else field.default
            assert f"| `SHOPKEEPER_{name.upper()}` | `{default}` | {field.description} |" in text


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text())
    dead = [link for link in links if not link.startswith("http") and not (path.parent / link).exists()]
    assert dead == []
