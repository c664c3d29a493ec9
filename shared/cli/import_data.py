"""`shopkeeper import`: files into feedback's log and profile's catalogue."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.cli.clients import Clients
from shared.cli.output import EXIT_OK, EXIT_PROBLEMS, say, show_json, show_table
from shared.cli.progress import StepProgress
from shared.importing.batches import EventBatch
from shared.importing.data_set import DataSet, open_data_set
from shared.importing.upload import Uploader


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did, and who the shoppers were (raw ids stay in this process)."""

    data_set: DataSet
    uploader: Uploader
    seconds: float
    events_of_user: Counter[str]
    explorers: int

    @property
    def explorer_share(self) -> float:
        """Returns the share of shoppers with more than one item, in [0, 1]."""
        return self.explorers / max(1, len(self.events_of_user))

    @property
    def exit_code(self) -> int:
        """Returns 1 when anything was rejected, else 0."""
        wrong = self.data_set.problems.rejected_rows + self.uploader.report.refused
        return EXIT_PROBLEMS if wrong else EXIT_OK


def import_path(clients: Clients, path: Path, mapping: str | None, *, quiet: bool = False) -> Imported:
    """Imports a directory or file and returns what happened.

    Raises:
        ImportRefused: nothing could be read.
        Unavailable: a service stayed away.
    """
    start = time.monotonic()
    # A log that is written while it is imported may be a little ahead of this clock.
    data_set = open_data_set(path, mapping, int((time.time() + 60) * 1_000_000))
    if not quiet:
        say(f"{data_set.mapping.title}: {', '.join(f.path.name for f in data_set.files)}")
        if data_set.mapping.note:
            say(data_set.mapping.note)
    uploader = Uploader(clients.channels["feedback"], clients.channels["profile"])
    users: Counter[str] = Counter()
    only_item: dict[str, str] = {}
    explorers: set[str] = set()

    def counted() -> Iterator[EventBatch]:
        for batch in data_set.events():
            users.update(batch.user_ids)
            for event, user in enumerate(batch.user_ids):
                if user not in explorers:
                    items = batch.item_ids[batch.offsets[event] : batch.offsets[event + 1]]
                    if any(item != only_item.setdefault(user, item) for item in items):
                        explorers.add(user)
            yield batch

    if any(file.source.role == "events" for file in data_set.files):
        with StepProgress("Events", "events", enabled=not quiet) as progress:
            sent = 0
            for count in uploader.send_events(counted()):
                sent += count
                progress.update(data_set.done, sent)
            progress.update(1.0, sent)
    with StepProgress("Items", "items", enabled=not quiet) as progress:
        sent = 0
        for count in uploader.send_items(data_set.items()):
            sent += count
            progress.update(data_set.done, sent)
        progress.update(1.0, sent)
    return Imported(data_set, uploader, time.monotonic() - start, users, len(explorers))


def show_import(imported: Imported, *, as_json: bool) -> None:
    """Prints the outcome: counts, what was left out and why, and examples of what was rejected."""
    problems, report = imported.data_set.problems, imported.uploader.report
    if as_json:
        document: dict[str, Any] = {
            "mapping": imported.data_set.mapping.name,
            "files": [str(f.path) for f in imported.data_set.files],
            "rows": imported.data_set.rows,
            "events": dict(report.events),
            "lines": report.lines,
            "items": dict(report.items),
            "rejected_rows": problems.rejected_rows,
            "rejected": [
                {"field": f, "problem": p, "rows": n} for (f, p), n in problems.rejected.most_common()
            ],
            "samples": [
                {"file": s.file, "row": s.row, "field": s.field, "value": s.value, "problem": s.problem, "remedy": s.remedy}
                for s in problems.samples
            ],
            "refused_by_the_services": report.samples,
            "left_out": dict(problems.left_out),
            "notes": dict(problems.notes),
            "retries": report.retries,
            "seconds": round(imported.seconds, 2),
        }  # fmt: skip
        show_json(document)
        return
    rows: list[tuple[str, str]] = [("rows read", f"{imported.data_set.rows:,}")]
    rows += [(f"events {status}", f"{count:,}") for status, count in sorted(report.events.items())]
    rows += [("lines of orders and single items", f"{report.lines:,}")] if report.lines else []
    rows += [(f"items {status}", f"{count:,}") for status, count in sorted(report.items.items())]
    rows += [(f"left out: {reason}", f"{count:,}") for reason, count in problems.left_out.most_common()]
    rows += [(f"note: {note}", f"{count:,}") for note, count in problems.notes.most_common()]
    rows += [(f"rejected: {f} {p}", f"{count:,}") for (f, p), count in problems.rejected.most_common()]
    show_table(
        f"Imported {imported.data_set.mapping.title} in {imported.seconds:.1f} s", ("what", "#number"), rows
    )
    for sample in problems.samples:
        say(f"  {sample}")
    for text in report.samples:
        say(f"  {text}")
