"""Each mistake gets one clear line and its exit code, and nothing is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoints import write_text_files
from tests.commands.invoking import CommandLine, Outcome


def _stored_jobs(nightherd: CommandLine) -> int:
    import sqlite3

    path = Path(nightherd.environment["NIGHTHERD_HOME"]) / "nightherd.db"
    if not path.exists():
        return 0
    with sqlite3.connect(path) as connection:
        tables = ("jobs", "requests", "chunks")
        counts = [connection.execute(f"SELECT count(*) FROM {t}").fetchone()[0] for t in tables]
    connection.close()
    return sum(counts)


def _fails(outcome: Outcome, code: int, *parts: str) -> None:
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert len(outcome.error_lines) == 1, outcome.err
    for part in parts:
        assert part in outcome.err


GOOD = '{"prompt": "Once upon a time"}\n'

BAD_FILES: list[tuple[str, str | bytes, tuple[str, ...]]] = [
    ("empty", "", ("empty",)),
    ("only blank lines", "\n \n\n", ("empty",)),
    ("noise", bytes(range(128, 256)) * 8, ("line 1", "UTF-8")),
    ("line 2 not JSON", GOOD + "{not json\n", ("line 2", "JSON")),
    ("line 2 without a prompt", GOOD + '{"custom_id": "a"}\n', ("line 2", "prompt")),
    (
        "a duplicate custom_id",
        '{"prompt": "a", "custom_id": "x"}\n{"prompt": "b", "custom_id": "x"}\n',
        ("line 2", "custom_id", "line 1"),
    ),
    ("an unknown parameter in a row", '{"prompt": "a", "temprature": 1}\n', ("temperature",)),
    ("a parameter out of range in a row", '{"prompt": "a", "top_p": 3}\n', ("line 1", "top_p")),
    (
        "parameters of job and row that contradict each other",
        '{"prompt": "a", "max_tokens": 2, "min_tokens": 5}\n',
        ("line 1", "min_tokens"),
    ),
    (
        "a schema that does not compile in a row",
        GOOD + '{"prompt": "a", "guided_json": {"type": "objekt"}}\n',
        ("line 2", "structured_outputs.json", "objekt"),
    ),
    (
        "a regex that does not compile in a row",
        GOOD + '{"prompt": "a", "params": {"structured_outputs": {"regex": "("}}}\n',
        ("line 2", "structured_outputs.regex", "unclosed group"),
    ),
    (
        "two structures in a row",
        GOOD + '{"prompt": "a", "structured_outputs": {"regex": "a", "choice": ["a"]}}\n',
        ("line 2", "exactly one", "regex and choice"),
    ),
    (
        "a prompt longer than the context",
        GOOD + json.dumps({"prompt": "east of the sun " * 1000}),
        ("line 2", "tokens", "the context of demo, 2,048"),
    ),
    (
        "token ids outside the vocabulary",
        GOOD + '{"prompt": [5, 2048]}\n',
        ("line 2", "2048", "vocabulary (0 to 2047)"),
    ),
    ("max_tokens beyond the context", '{"prompt": "a", "max_tokens": 2049}', ("line 1", "2,048")),
]


@pytest.mark.parametrize(("content", "parts"), [case[1:] for case in BAD_FILES],
                         ids=[case[0] for case in BAD_FILES])  # fmt: skip
def test_a_bad_file_is_one_line_and_nothing_is_stored(
    nightherd: CommandLine, tmp_path: Path, content: str | bytes, parts: tuple[str, ...]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    _fails(nightherd("submit", path), 2, *parts)
    assert _stored_jobs(nightherd) == 0


BAD_OPTIONS: list[tuple[list[str], tuple[str, ...]]] = [
    (["--temperature", "-1"], ("temperature", "-1")),
    (["--max-tokens", "0"], ("max_tokens", "0")),
    (["--top-p", "3"], ("top_p", "3")),
    (["--param", "temprature=1"], ("temprature", "temperature")),
    (["--param", "best_of=3"], ("best_of",)),
    (["--param", 'response_format={"type": "jsn"}'], ("response_format.type", "'jsn'")),
    (["--param", 'guided_json={"type": "objekt"}'], ("structured_outputs.json", "objekt")),
    (["--param", "guided_regex=("], ("structured_outputs.regex", "unclosed group")),
    (
        ["--param", 'guided_choice=["a"]', "--param", 'response_format={"type": "json_object"}'],
        ("response_format and structured_outputs",),
    ),
    (["--param", "guided_regex=a", "--stop", "b"], ("stop", "structured_outputs.regex")),
    (["--task", "extract"], ("--schema",)),
    (["--task", "extract", "--schema", "nowhere.json"], ("nowhere.json", "No such file")),
    (["--task", "extract", "--schema", "{"], ("--schema", "not JSON")),
    (["--task", "extract", "--schema", '{"not": {}}'], ("--schema", '["not"]')),
    (["--schema", "{}"], ("--task extract",)),
    (["--param", "seed=3"], ("--seed",)),
    (["--deadline", "2020-01-01"], ("passed",)),
    (["--seed", "many"], ("--seed", "many")),
    (["--checkpoint", "."], ("config.json",)),
    (["--no-such-option"], ("--no-such-option",)),
    (["--template", "{{ nothere }}"], ("line 1", "nothere")),
    (["--template", "{{ unclosed"], ("--template",)),
    (["--task", "translate"], ("target_language",)),
    (["--task", "classify"], ("labels",)),
    (["--not-before", "yesterdayish"], ("yesterdayish",)),
    (["--checkpoint", "no such thing"], ("no such thing",)),
    (["--checkpoint", "./missing"], ("missing",)),
    (["--min-tokens", "9", "--max-tokens", "3"], ("min_tokens", "max_tokens")),
    (["--max-tokens", "2049"], ("max_tokens 2,049", "context of demo, 2,048")),
    (["--param", "max_length=5000"], ("max_length 5,000", "context of demo, 2,048")),
    (["--stop-token-id", "2048"], ("stop_token_ids", "2048", "vocabulary of demo")),
]


@pytest.mark.parametrize(
    ("options", "parts"), BAD_OPTIONS, ids=[" ".join(o) for o, _ in BAD_OPTIONS]
)
def test_a_bad_option_is_one_line_and_nothing_is_stored(
    nightherd: CommandLine, tmp_path: Path, options: list[str], parts: tuple[str, ...]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(GOOD)
    outcome = nightherd("submit", path, *options)
    _fails(outcome, 1 if "--checkpoint" in options else 2, *parts)
    assert _stored_jobs(nightherd) == 0


def test_a_chat_on_a_checkpoint_without_a_template(nightherd: CommandLine, tmp_path: Path) -> None:
    folder = write_text_files(tmp_path / "base", template=None)
    path = tmp_path / "prompts.jsonl"
    path.write_text(GOOD + json.dumps({"messages": [{"role": "user", "content": "Hello"}]}))
    outcome = nightherd("submit", path, "--checkpoint", folder)
    _fails(outcome, 2, "line 2", "has no chat template", "--chat-template FILE")
    assert _stored_jobs(nightherd) == 0


def test_no_such_file(nightherd: CommandLine) -> None:
    _fails(nightherd("submit", "missing.jsonl"), 2, "missing.jsonl", "no such file")


def test_all_bad_rows_are_reported_with_their_lines(nightherd: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(GOOD + "nonsense\n" + GOOD + '{"prompt": 7}\n')
    outcome = nightherd("submit", path)
    assert outcome.code == 2
    assert "2 rows are bad" in outcome.error_lines[0]
    assert "line 2" in outcome.error_lines[1]
    assert "line 4" in outcome.error_lines[2]
    assert _stored_jobs(nightherd) == 0


@pytest.mark.parametrize(
    "command",
    [
        ["status", "nosuchjob"],
        ["results", "nosuchjob"],
        ["show", "nosuchjob", "0"],
        ["errors", "nosuchjob"],
        ["cancel", "nosuchjob"],
        ["pause", "nosuchjob"],
        ["resume", "nosuchjob"],
        ["retry", "nosuchjob"],
        ["set", "nosuchjob", "--priority", "1"],
    ],
    ids=lambda command: command[0],
)
def test_a_job_that_does_not_exist(nightherd: CommandLine, command: list[str]) -> None:
    _fails(nightherd(*command), 3, "nosuchjob", "nightherd jobs")


def test_a_row_that_does_not_exist(nightherd: CommandLine, tmp_path: Path) -> None:
    job = nightherd("submit", "-", stdin="a\nb\n").out.strip()
    _fails(nightherd("show", job, "2"), 3, "no row 2", "0 to 1")


def test_an_ambiguous_prefix(nightherd: CommandLine) -> None:
    jobs = [nightherd("submit", "-", stdin="a\n").out.strip() for _ in range(2)]
    _fails(nightherd("status", jobs[0][:1]), 2, *jobs)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://someone:secret@127.0.0.1:1/nightherd",
        "sqlite:////nonexistent/folder/nightherd.db",
        "mysql://localhost/x",
        "nonsense",
    ],
)
def test_a_database_that_refuses(nightherd: CommandLine, tmp_path: Path, url: str) -> None:
    environment = {**nightherd.environment, "NIGHTHERD_DATABASE_URL": url}
    command = CommandLine(environment, tmp_path)
    code = 4 if url.startswith(("postgresql", "sqlite")) else 2
    if url.startswith("sqlite"):
        # As root any folder can be made: a file stands where the folder should be.
        (tmp_path / "file").write_text("")
        environment["NIGHTHERD_DATABASE_URL"] = f"sqlite:///{tmp_path}/file/nightherd.db"
    outcome = command("submit", "-", stdin="a\n")
    _fails(outcome, code)
    assert "secret" not in outcome.err


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("NIGHTHERD_TICK_SECONDS", "soon", ("NIGHTHERD_TICK_SECONDS", "soon")),
        ("NIGHTHERD_TICK_SECOND", "1", ("NIGHTHERD_TICK_SECOND", "NIGHTHERD_TICK_SECONDS")),
    ],
)
def test_a_bad_setting_is_named(
    nightherd: CommandLine, tmp_path: Path, name: str, value: str, parts: tuple[str, ...]
) -> None:
    command = CommandLine({**nightherd.environment, name: value}, tmp_path)
    _fails(command("jobs"), 2, *parts)


def test_json_answers_are_json(nightherd: CommandLine) -> None:
    job = nightherd("submit", "-", "--name", "mine", stdin="a\n").out.strip()
    listed = json.loads(nightherd("jobs", "--json").out)
    assert [entry["id"] for entry in listed] == [job]
    status = json.loads(nightherd("status", job, "--json").out)
    assert (status["state"], status["samples"], status["name"]) == ("queued", 1, "mine")
    assert json.loads(nightherd("workers", "--json").out) == []
    assert json.loads(nightherd("errors", job, "--json").out) == []
    shown = json.loads(nightherd("show", job, "0", "--json").out)
    assert shown["request"] == {"prompt": "a"}


def test_submit_prints_the_id_alone_and_says_that_no_worker_is_there(
    nightherd: CommandLine,
) -> None:
    outcome = nightherd("submit", "-", stdin="a\n")
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == 1
    assert len(outcome.error_lines) == 1
    assert "nightherd worker --checkpoint demo" in outcome.err


def test_unique_prefixes_are_accepted(nightherd: CommandLine) -> None:
    job = nightherd("submit", "-", stdin="a\n").out.strip()
    assert json.loads(nightherd("status", job[:3], "--json").out)["id"] == job


def test_a_reader_that_closes_early_is_no_error(nightherd: CommandLine, tmp_path: Path) -> None:
    import subprocess

    from tests.commands.invoking import NIGHTHERD

    writer = subprocess.Popen(
        [*NIGHTHERD, "submit", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(nightherd.environment),
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    assert b"Traceback" not in writer.stderr.read()
    writer.stderr.close()
    writer.wait(10)
