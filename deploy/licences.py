"""Every package of every image with its version and licence, as Markdown: `python deploy/licences.py > licences.md`.

Ends with code 1 where a licence is unknown, or asks for more than this project may give (GPL, AGPL, SSPL, non-commercial).
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements"
IMAGES = ("recommend", "profile", "feedback", "trainer")
# LGPL libraries are linked, not changed: their terms are met by naming them.
REFUSED = re.compile(
    r"(?<!L)(?<!Lesser )\b(A?GPL|SSPL|BUSL|Commons Clause|Non-?Commercial)|GNU (Affero )?General Public", re.I
)
ALLOWED = re.compile(
    r"Apache|BSD|MIT|ISC|PSF|Python Software|MPL|Mozilla|LGPL|Lesser|Unlicense|Zlib|0BSD|CC0|HPND|Unicode|Historical|Boost|BSL",
    re.I,
)

# They say it in a file alone.
READ_BY_A_PERSON = {"namex": "Apache-2.0"}


def pinned(image: str) -> dict[str, str]:
    """Returns name → version of an image's packages."""
    text = (REQUIREMENTS / f"{image}.txt").read_text()
    return dict(re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==(\S+)", text, re.M))


def licence_of(name: str) -> str:
    """Returns what the installed package says, in a line; empty where it says nothing."""
    if name in READ_BY_A_PERSON:
        return READ_BY_A_PERSON[name]
    about = metadata.metadata(name)
    said = [about.get("License-Expression") or ""]
    said += [
        value.rpartition("::")[2].strip()
        for value in about.get_all("Classifier") or []
        if value.startswith("License ::")
    ]
    text = (about.get("License") or "").strip()
    said.append(text.splitlines()[0][:80] if text else "")
    return next((each for each in said if each and each != "OSI Approved"), "")


def report() -> tuple[str, list[str]]:
    """Returns the report, and what is wrong."""
    images: dict[str, list[str]] = {}
    versions: dict[str, str] = {}
    for image in IMAGES:
        for name, version in pinned(image).items():
            images.setdefault(name, []).append(image)
            versions[name] = version
    lines = [
        "# Licences of what the images carry",
        "",
        "| package | version | licence | in |",
        "|---|---|---|---|",
    ]
    wrong = []
    for name in sorted(images, key=str.lower):
        try:
            licence = licence_of(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is not installed here: run it in the development environment")
            continue
        if not licence or REFUSED.search(licence) or not ALLOWED.search(licence):
            wrong.append(f"{name} {versions[name]}: {licence or 'says nothing'}")
        lines.append(f"| {name} | {versions[name]} | {licence} | {', '.join(images[name])} |")
    return "\n".join(lines) + "\n", wrong


if __name__ == "__main__":
    text, problems = report()
    sys.stdout.write(text)
    for problem in problems:
        print(problem, file=sys.stderr)
    raise SystemExit(1 if problems else 0)
