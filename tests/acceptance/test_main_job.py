"""A prompts file goes in, every result comes out: in one process group, and by separate ones."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from models.database import Database
from tests.acceptance.conftest import DATA, RAGGED, Fleet, write_jsonl
from tests.conftest import wait_until

TOKENS = "64"


def _real_inputs(folder: Path) -> list[tuple[Path, list[str], int]]:
    """The two real inputs, with the options that read them; stand-ins where they are not here."""
    mt_bench, gsm8k = DATA / "mt_bench_questions.jsonl", DATA / "gsm8k_200.jsonl"
    if not (mt_bench.exists() and gsm8k.exists()):
        chats = [
            {"messages": [{"role": "user", "content": f"Tell me story {i}."}]} for i in range(80)
        ]
        questions = [{"question": f"How much is {i} and {i}?", "answer": "?"} for i in range(200)]
        return [
            (write_jsonl(folder / "chats.jsonl", chats), [], 80),
            (
                write_jsonl(folder / "questions.jsonl", questions),
                ["--template", "{{ question }}"],
                200,
            ),
        ]
    turns = [json.loads(line)["turns"][0] for line in mt_bench.read_text().splitlines()]
    chats = [{"messages": [{"role": "user", "content": turn}]} for turn in turns]
    return [
        (write_jsonl(folder / "chats.jsonl", chats), [], 80),
        (gsm8k, ["--template", "{{ question }}"], 200),
    ]


def _every_row_once(rows: list[dict[str, Any]], count: int) -> None:
    assert [(row["index"], row["sample"]) for row in rows] == [(i, 0) for i in range(count)]
    for row in rows:
        assert row["error"] is None
        assert row["finish_reason"] in ("stop", "length")
        assert isinstance(row["text"], str)
        assert row["completion_tokens"] <= int(TOKENS)
        assert row["prompt_tokens"] > 0
    # A checkpoint may answer with its end of sequence at once; not often.
    assert sum(bool(row["text"]) for row in rows) > 0.8 * count


def test_run_on_the_embedded_default(embedded: Fleet, tmp_path: Path) -> None:
    for path, options, count in _real_inputs(tmp_path):
        output = tmp_path / "results.jsonl"
        outcome = embedded.nightherd(
            "run", path, "--max-tokens", TOKENS, "-o", output, *options, seconds=150
        )
        assert outcome.code == 0, outcome
        job = outcome.out.strip()
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        _every_row_once(rows, count)
        assert rows == embedded.results(job)
        assert embedded.status(job)["state"] == "completed"


def test_run_prints_the_rows_without_an_output_file(embedded: Fleet, stories: Path) -> None:
    outcome = embedded.nightherd("run", stories, "--max-tokens", "4")
    assert outcome.code == 0, outcome
    assert [json.loads(line)["index"] for line in outcome.out.splitlines()] == list(range(60))


def test_separate_processes(fleet: Fleet, tmp_path: Path, database_url: str) -> None:
    fleet.start_workers(2)
    submitted = [
        (fleet.submit(path, "--max-tokens", TOKENS, "--temperature", "0.7", *options), count)
        for path, options, count in _real_inputs(tmp_path)
    ]
    for job, count in submitted:
        view = fleet.wait(job, seconds=170)
        assert (view["state"], view["done"], view["failed"]) == ("completed", count, 0)
        _every_row_once(fleet.results(job), count)
        _stored_with_provenance(database_url, job, count)
    shown = fleet.json("show", submitted[1][0], "3")
    sample = shown["samples"][0]
    assert sample["effective_params"]["temperature"] == 0.7
    assert sample["effective_params"]["max_tokens"] == int(TOKENS)
    assert sample["provenance"]["checkpoint_key"] == "demo"
    assert sample["provenance"]["weights_hash"]
    assert shown["template"]["template"] == "{{ question }}"


def _stored_with_provenance(url: str, job: str, count: int) -> None:
    database = Database(url)
    with database.read() as connection:
        whole = connection.execute(
            text(
                "SELECT count(*) FROM results r JOIN parameter_sets s ON s.id = r.parameter_set_id "
                "JOIN provenance p ON p.id = r.provenance_id WHERE r.job_id = :job "
                "AND r.seed IS NOT NULL AND r.worker_id IS NOT NULL AND r.finished_at IS NOT NULL"
            ),
            {"job": job},
        ).scalar_one()
    database.close()
    assert whole == count


def test_results_are_readable_while_the_job_runs(embedded: Fleet, tmp_path: Path) -> None:
    ragged = [{"prompt": "Once upon a time", "max_tokens": length} for length in RAGGED]
    job = embedded.submit(write_jsonl(tmp_path / "ragged.jsonl", ragged), "--ignore-eos")
    worker = embedded.start("worker", "--checkpoint", "demo", "--device", "cpu")
    wait_until(lambda: embedded.view(job).done > 0, seconds=90, what="a first saved row")
    # However long the command takes to start, the job runs.
    worker.send_signal(signal.SIGSTOP)
    rows = embedded.results(job)
    worker.send_signal(signal.SIGCONT)
    assert 0 < len(rows) < 60
    assert [row["index"] for row in rows] == sorted(row["index"] for row in rows)
    assert all(row["completion_tokens"] == RAGGED[row["index"]] for row in rows)
    assert embedded.wait(job)["done"] == 60


def test_a_failed_row_fails_alone_and_can_be_retried(embedded: Fleet, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Once upon a time"},
        {"prompt": "a " * 9, "max_length": 9},
        {"prompt": "One morning"},
    ]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    outcome = embedded.nightherd("run", path, "--max-tokens", "4", "-o", tmp_path / "out.jsonl")
    assert outcome.code == 5
    job = outcome.out.strip()
    (failed,) = embedded.json("errors", job)
    assert (failed["index"], failed["error"]["code"]) == (1, "context_length_exceeded")
    assert embedded.json("status", job)["failures"] == {"context_length_exceeded": 1}
    assert embedded.nightherd("retry", job, "--only", "poison").out.strip() == "0"
    assert embedded.nightherd("retry", job).out.strip() == "1"
    assert embedded.status(job)["state"] == "running"
    embedded.start_workers(1)
    view = embedded.wait(job)
    assert (view["state"], view["done"], view["failed"]) == ("completed", 2, 1)
    assert [row["index"] for row in embedded.results(job)] == [0, 1, 2]


@pytest.mark.parametrize("seed", [7])
def test_the_same_seed_gives_the_same_rows(embedded: Fleet, stories: Path, seed: int) -> None:
    embedded.start_workers(1, "--dtype", "float32")
    runs = []
    for _ in range(2):
        options = ("--seed", str(seed), "--max-tokens", "12", "--temperature", "0.8", "--n", "2")
        job = embedded.submit(stories, *options)
        assert embedded.wait(job)["done"] == 120
        runs.append(embedded.results(job))
    assert runs[0] == runs[1]
    assert runs[0][0]["text"] != runs[0][1]["text"]
