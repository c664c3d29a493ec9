"""What `make bench-quality` reads, says and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from services.trainer import bench_quality
from services.trainer.bench_quality import _without, over_seeds, read_attributes, read_sequences
from tests.trainer.conftest import walk

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = {"hr@5", "hr@10", "hr@20", "ndcg@10"}


def bench(directory: Path, *options: str) -> tuple[dict, dict[str, list[str]]]:
    """Returns the last line and the answers by user."""
    topk = directory / "topk.txt"
    command = [sys.executable, "-m", "services.trainer.bench_quality", "--data", directory, "--topk", topk]
    done = subprocess.run(
        [*map(str, command), "--size", "tiny", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in topk.read_text().splitlines()]
    return json.loads(done.stdout.splitlines()[-1]), {user: items for user, *items in lines}


def test_everybody_is_answered_with_items_that_are_new_to_them_whatever_the_ids(tmp_path: Path) -> None:
    sequences = {
        f"u{n}": [str(7 * item + 1_000_003) for item in items]
        for n, items in enumerate(walk(users=150, items=40))
    }
    sequences["only-one"] = [sequences["u0"][0]]
    (tmp_path / "sequences.txt").write_text(
        "\n".join(" ".join([user, *items]) for user, items in sequences.items()) + "\n\n"
    )
    (tmp_path / "item_attributes.json").write_text(
        json.dumps({items[0]: [1, 2] for items in sequences.values()})
    )
    said, answers = bench(tmp_path, "--short-ladder")

    assert set(answers) == set(sequences)
    catalogue = {item for items in sequences.values() for item in items}
    hits = 0
    tested = 0
    for user, (*before, last) in sequences.items():
        answer = answers[user]
        assert len(answer) == len(set(answer)) <= 20
        assert set(answer) <= catalogue - set(before)
        if before and last not in before:
            tested += 1
            hits += last in answer[:10]
    # What is said is what the answers are worth.
    assert said["users"] == tested
    assert said["hr@10"] == pytest.approx(hits / tested, abs=1e-5)
    assert set(said) >= NAMES
    assert set(said["transformer"]) == NAMES
    assert {"popularity", "item_knn", "cooccurrence"} <= set(said["ladder"])
    assert {"train_cpu_seconds", "train_wall_seconds", "peak_rss_mb"} <= set(said)


def test_a_file_of_one_person_is_answered_by_popularity(tmp_path: Path) -> None:
    (tmp_path / "sequences.txt").write_text("1 5 6 7\n")
    said, answers = bench(tmp_path)
    assert answers == {"1": ["7"]}
    assert said["users"] == 1
    assert said["gate"] == "FAILED"


def test_a_file_of_histories_keeps_its_order_whatever_its_white_space(tmp_path: Path) -> None:
    path = tmp_path / "sequences.txt"
    path.write_bytes(b"\xef\xbb\xbfb\t9  8 9 \r\n\r\n  a 8\nc 7 8 8\nb 4\nd\n")
    sequences = read_sequences(path)
    events = sequences.events
    # A person in two lines is one person; a name without items did nothing.
    assert sequences.names == ["b", "a", "c", "d"]
    assert events.user_E.tolist() == [0, 0, 0, 0, 1, 2, 2, 2]
    assert [events.item_ids[item] for item in events.item_E] == ["9", "8", "9", "4", "8", "7", "8", "8"]
    assert events.order_E.tolist() == [0, 1, 2, 3, 0, 0, 1, 2]
    assert sequences.ends_in_run == {2}


def test_attributes_may_be_missing_alone_or_of_nobody(tmp_path: Path) -> None:
    path = tmp_path / "item_attributes.json"
    assert read_attributes(path) == {}
    path.write_text('{"1": [3, "x"], "2": "red", "nobody": [], "3": null}')
    assert read_attributes(path) == {"1": ["3", "x"], "2": ["red"], "nobody": []}


def test_who_took_the_same_twice_at_last_is_answered_after_both_and_not_tested(tmp_path: Path) -> None:
    lines = {f"u{n}": [str(item) for item in items] for n, items in enumerate(walk(users=120, items=30))}
    runs = {f"r{n}": [*items, items[-1]] for n, items in enumerate(lines.values()) if n < 20}
    everybody = {**lines, **runs, "twice": ["3", "3"]}
    (tmp_path / "sequences.txt").write_text("".join(f"{u} {' '.join(i)}\n" for u, i in everybody.items()))
    said, answers = bench(tmp_path, "--short-ladder")
    assert set(answers) == set(everybody)
    for user, items in everybody.items():
        assert not set(answers[user]) & set(items[:-1]), user
    assert said["users"] == sum(items[-1] not in items[:-1] for items in lines.values())


LINES = "".join(f"u{n} {' '.join(map(str, items))}\n" for n, items in enumerate(walk(users=30, items=12)))


@pytest.mark.parametrize(
    ("files", "options", "said"),
    [
        ({}, (), "sequences.txt: No such file or directory. It must hold a person a line"),
        ({"sequences.txt": b"a 1 2 3\nb 2 \xff\xfe\n"}, (), "sequences.txt, line 2: not UTF-8"),
        ({"item_attributes.json": b'{"1": ["red"'}, (), "It must be JSON: item id to a list of values"),
        ({"item_attributes.json": b"[1, 2]"}, (), "must be a JSON object"),
        ({"item_vectors.npz": b"junk"}, (), "item_vectors.npz"),
        ({}, ("--topk", "{}/nowhere/topk.txt"), "there is no directory"),
        ({}, ("--topk", "{}"), "it is a directory"),
        ({}, ("--data", "{}/nowhere"), "no such directory. It must hold sequences.txt"),
        ({}, ("--set", "dimension=big"), "must be NAME=NUMBER"),
        ({}, ("--set", "depth=3"), "is no hyper-parameter"),
        ({}, ("--size", "huge"), "must be one of tiny, small"),
        ({}, ("--seeds", "0"), "--seeds must be at least 1"),
    ],
)
def test_what_cannot_be_read_is_said_before_anything_is_trained(
    files: dict[str, bytes], options: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(bench_quality, "train_model", lambda *_, **__: pytest.fail("it began to train"))
    if said[:13] != "sequences.txt":
        (tmp_path / "sequences.txt").write_text(LINES)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    words = ["--data", str(tmp_path), *(option.format(tmp_path) for option in options)]
    monkeypatch.setattr(sys, "argv", ["bench_quality", *words])
    with pytest.raises(SystemExit) as ended:
        bench_quality.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("lines", "answers"),
    [
        ("", ""),
        ("nobody\ndid-anything\n", ""),
        ("only 1\n", "only 1\n"),
        ("a 1 1 1\nb 1\nc 1 1\n", "a\nb 1\nc\n"),
        ("a 1 2\nb 2 3\n", "a 2 3\nb 1 3\n"),
    ],
)
def test_a_file_that_nothing_can_be_learned_from_is_answered_all_the_same(
    lines: str, answers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    (tmp_path / "sequences.txt").write_text(lines)
    (tmp_path / "item_attributes.json").write_text('{"nobody has this": ["red"]}')
    topk = tmp_path / "topk.txt"
    monkeypatch.setattr(sys, "argv", ["bench_quality", "--data", str(tmp_path), "--topk", str(topk)])
    bench_quality.main()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(said) >= {*NAMES, "transformer", "ladder", "frozen_counts"}
    assert [line.split() for line in topk.read_text().splitlines()] == [
        a.split() for a in answers.splitlines()
    ]


def test_several_seeds_give_means_and_standard_deviations() -> None:
    def line(seed: int, value: float) -> dict:
        measures = dict.fromkeys(NAMES, value)
        costs = dict.fromkeys(
            ("train_cpu_seconds", "train_wall_seconds", "wall_seconds", "peak_rss_mb"), 10.0 * seed
        )
        return {
            **measures,
            "transformer": dict.fromkeys(NAMES, value / 2),
            "frozen_counts": measures,
            "seed": seed,
            **costs,
        }

    said = over_seeds([line(1, 0.1), line(2, 0.2), line(3, 0.3)])
    assert said["hr@10"] == pytest.approx(0.2)
    assert said["transformer"]["ndcg@10"] == pytest.approx(0.1)
    assert said["sd"]["hr@10"] == pytest.approx(np.std([0.1, 0.2, 0.3], ddof=1))
    assert said["sd"]["transformer"]["hr@10"] == pytest.approx(0.05)
    assert said["seeds"] == [1, 2, 3]
    assert said["peak_rss_mb"] == 30.0


def test_an_option_is_left_out_together_with_its_value() -> None:
    assert _without(["--data", "d", "--topk", "f", "--seed", "3", "--refit"], "--topk", "--seed") == [
        "--data", "d", "--refit",
    ]  # fmt: skip
