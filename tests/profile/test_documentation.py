"""The manual of portraits tells every setting, as the code has it."""

from __future__ import annotations

import re
from pathlib import Path

from services.profile.settings import ProfileSettings
from shared.settings import ServiceSettings

MANUAL = Path(__file__).resolve().parents[2] / "docs" / "profiles.md"


def test_every_setting_of_the_service_is_in_the_manual_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `SHOPKEEPER_([A-Z_]+)` \| ([^|]+) \|", MANUAL.read_text(), re.MULTILINE))
    own = {
        name: field
        for name, field in ProfileSettings.model_fields.items()
        if name not in ServiceSettings.model_fields
    }
    assert {name.lower() for name in rows} == set(own)
    for name, field in own.items():
        told = rows[name.upper()].strip()
        assert told == (str(field.default) if field.default is not None else "`<home>/imports`"), name
