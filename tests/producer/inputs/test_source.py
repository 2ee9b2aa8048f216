"""What a schedule reads: placeholders, globs as one input, and queries on real databases."""

from __future__ import annotations

import os
import tracemalloc
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import select, text

from models.database import Database
from models.job import Request
from nightherd.errors import InputError, UsageError
from producer.inputs import query as queries
from producer.inputs.moment import Moment, fill
from producer.inputs.reader import ReadOptions, Row
from producer.inputs.source import check_source, open_source
from producer.jobs.create import JobOptions, submit
from producer.prompts.template import BadRowError, compile_template
from producer.tasks.registry import make_builder
from tests.faults.killing import url_of

BERLIN = ZoneInfo("Europe/Berlin")
NIGHT = Moment(
    datetime(2026, 3, 30, 2, 0, tzinfo=BERLIN), datetime(2026, 3, 29, 3, 0, tzinfo=BERLIN), 17
)
WAREHOUSE = "WAREHOUSE_URL"
MADE = ("2026-03-28 12:00:00", "2026-03-29 01:30:00", "2026-03-29 22:00:00", "2026-03-30 00:00:00")


def read(source: dict[str, Any], moment: Moment = NIGHT, **options: Any) -> list[str]:
    """Each row's prompt, or its problem in brackets."""
    with open_source(source, moment, ReadOptions(**options)) as (rows, _):
        return [row.body["prompt"] if isinstance(row, Row) else f"[{row}]" for row in rows]


def refusal(source: dict[str, Any], **options: Any) -> str:
    with pytest.raises(InputError) as error:
        read(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# Placeholders.


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/data/in.jsonl", "/data/in.jsonl"),
        ("/data/{{ scheduled_for | date }}/*.jsonl", "/data/2026-03-30/*.jsonl"),
        ("{{ scheduled_for | date('%Y/%m/%d_%H%M') }}", "2026/03/30_0200"),
        ("{{ scheduled_for | days(-1) | date }}", "2026-03-29"),
        # In the night before the clocks went forward: a day of 23 hours, and 24 hours.
        ("{{ scheduled_for | days(-2) }}", "2026-03-28T02:00:00+01:00"),
        ("{{ scheduled_for | hours(-48) }}", "2026-03-28T01:00:00+01:00"),
        ("{{ scheduled_for }}-{{ firing }}", "2026-03-30T02:00:00+02:00-17"),
        ("{{ '%03d' | format(firing) }}", "017"),
    ],
)
def test_placeholders(given: str, expected: str) -> None:
    assert fill(given, NIGHT, "INPUT") == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{{ scheduled }}", "--output: {{ scheduled }} means nothing here"),
        ("{{ firing | date }}", "--output: | date is for times"),
        ("{{ scheduled_for", "--output, line 1: unexpected end of template"),
        ("{{ scheduled_for.__class__ }}", "--output: access to attribute '__class__'"),
        ("{{ scheduled_for | days('a') }}", "--output: TypeError"),
        ("{{ scheduled_for | days(10**7) }}", "--output: OverflowError"),
    ],
)
def test_bad_placeholders_are_one_line(given: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        fill(given, NIGHT, "--output")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_firing_without_a_number() -> None:
    nameless = Moment(NIGHT.scheduled_for, None, None)
    assert fill("{{ scheduled_for | date }}", nameless, "INPUT") == "2026-03-30"
    with pytest.raises(UsageError, match="no number yet"):
        fill("{{ firing }}", nameless, "INPUT")


def test_variables_of_templates_and_a_column_that_wins() -> None:
    builder = make_builder(
        template="{{ scheduled_for | date }}: {{ text }}",
        system="Run {{ firing }}",
        variables=NIGHT.variables(),
    )
    assert builder is not None
    assert builder.from_columns({"text": "a"})["messages"] == [
        {"role": "system", "content": "Run 17"},
        {"role": "user", "content": "2026-03-30: a"},
    ]
    template = compile_template("{{ firing }}", "--template", {"firing": 1})
    assert template.render({"firing": "mine"}) == "mine"
    with pytest.raises(BadRowError, match="column 'firing' is not there"):
        compile_template("{{ firing }}", "--template").render({"a": 1})
    with pytest.raises(BadRowError, match="column 'when' is not there"):
        compile_template("{{ when | date }}", "--template").render({"a": 1})


# Files.


def write(folder: Path, name: str, *lines: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_glob_is_one_input_in_sorted_order(tmp_path: Path) -> None:
    write(tmp_path, "2026-03-30/b.jsonl", '{"prompt": "b1"}')
    write(tmp_path, "2026-03-30/a.jsonl", '{"prompt": "a1"}', '{"prompt": "a2"}')
    write(tmp_path, "2026-03-30/c.txt", "plain")
    write(tmp_path, "2026-03-30/empty.jsonl")
    write(tmp_path, "2026-03-30/.hidden.jsonl", "broken")
    write(tmp_path, "2026-03-29/a.jsonl", '{"prompt": "of another day"}')
    source = {"path": f"{tmp_path}/{{{{ scheduled_for | date }}}}/*"}
    assert read(source) == ["a1", "a2", "b1", "plain"]
    with open_source(source, NIGHT, ReadOptions()) as (_, name):
        assert name == f"{tmp_path}/2026-03-30/* (4 files)"


def test_problems_name_file_and_line(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", '{"prompt": "a", "custom_id": "x"}', "{")
    write(tmp_path, "sub/b.jsonl", "", '{"prompt": "b", "custom_id": "x"}', '{"prompt": 1}')
    got = read({"path": f"{tmp_path}/**/*.jsonl"})
    assert got[0] == "a"
    assert got[1].startswith("[a.jsonl line 2: not JSON")
    assert got[2] == "[sub/b.jsonl line 2: custom_id 'x' was already used on a.jsonl line 1]"
    assert got[3].startswith("[sub/b.jsonl line 3: prompt must be a string")


def test_submit_names_file_and_line_too(
    sqlite_database: Database, tmp_path: Path, make_settings: Any
) -> None:
    write(tmp_path, "in/a.jsonl", '{"prompt": "a"}')
    write(tmp_path, "in/b.jsonl", '{"prompt": "b"}', '{"prompt": "b", "top_k": -7}', "{")
    options = JobOptions(checkpoint_key="demo")
    source = {"path": f"{tmp_path}/in/*.jsonl"}
    with (
        open_source(source, NIGHT, ReadOptions()) as (rows, name),
        pytest.raises(InputError, match="2 rows are bad, nothing was stored") as error,
    ):
        submit(sqlite_database, make_settings(), rows, options, source=name)
    first, second = error.value.problems
    assert first.startswith("b.jsonl line 2: top_k")
    assert second.startswith("b.jsonl line 3: not JSON")


def test_one_match_reads_as_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "only.jsonl", "{x}")
    with open_source({"path": f"{tmp_path}/*.jsonl"}, NIGHT, ReadOptions()) as (rows, name):
        assert name == str(path)
        assert str(next(iter(rows))).startswith("line 1: not JSON")
    odd = write(tmp_path, "in[1].jsonl", '{"prompt": "odd"}')
    assert read({"path": str(odd)}) == ["odd"]


def test_what_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal({"path": f"{tmp_path}/*.jsonl"}) == f"{tmp_path}/*.jsonl: no file matches"
    assert refusal({"path": f"{tmp_path}/a.jsonl"}) == f"{tmp_path}/a.jsonl: no such file"
    (tmp_path / "folder").mkdir()
    assert "is a folder" in refusal({"path": f"{tmp_path}/folder"})
    write(tmp_path, "a.txt", "a")
    assert f"{tmp_path}/folder is a folder" in refusal({"path": f"{tmp_path}/*"})
    (tmp_path / "folder").rmdir()
    write(tmp_path, "b.txt", "b")
    # Root may read anything, so the system's answer is played.
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("b.txt"))
    refused = f"{tmp_path}/b.txt cannot be read: Permission denied"
    assert refusal({"path": f"{tmp_path}/*"}) == refused


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "-"}, "INPUT - is standard input"),
        ({"path": ""}, "INPUT is empty"),
        ({"path": "/data/{{ day }}"}, "INPUT: {{ day }} means nothing here"),
        ({"sql": "DELETE FROM t", "database": "A"}, "--input-sql must be a SELECT, got DELETE"),
        ({"sql": "-- SELECT", "database": "A"}, "--input-sql must be a SELECT"),
        ({"sql": "", "database": "A"}, "--input-sql must be a SELECT, got nothing"),
        ({"sql": "SELECT 1; DROP TABLE t", "database": "A"}, "--input-sql holds several"),
        ({"sql": "SELECT :day", "database": "A"}, "--input-sql: no parameter :day (there"),
        ({"sql": "SELECT 1", "database": "postgresql://u:hush@h/d"}, "--input-database takes the"),
    ],
)
def test_what_is_known_at_add(source: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        check_source(source)
    assert str(error.value).startswith(message)
    assert "hush" not in str(error.value)


def test_good_sources_pass() -> None:
    check_source({"path": "/data/{{ scheduled_for | days(-1) | date }}/*_{{ firing }}.jsonl"})
    check_source({"sql": " (SELECT ';:x', \":y\" -- :z ;\n) ; ", "database": "WAREHOUSE_URL"})
    check_source({"sql": "WITH a AS (SELECT $$ :b; $$) SELECT * FROM a", "database": "_A1"})


# Queries.


@pytest.fixture
def warehouse(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """A database with a table of its own, and the variable that holds its URL."""
    monkeypatch.setenv(WAREHOUSE, url_of(database).replace("postgresql+psycopg", "postgresql"))
    time = "timestamptz" if database.dialect == "postgresql" else "text"
    with database.write() as connection:
        connection.execute(text(f"CREATE TABLE visits (id integer, made {time}, note text)"))
        for number, made in enumerate(MADE):
            utc = made if database.dialect == "sqlite" else f"{made}+00"
            connection.execute(
                text("INSERT INTO visits VALUES (:id, :made, :note)"),
                {"id": number, "made": utc, "note": f"note {number}"},
            )
    yield database
    with database.write() as connection:
        connection.execute(text("DROP TABLE visits"))


def ask(query: str) -> dict[str, Any]:
    return {"sql": query, "database": WAREHOUSE}


def test_a_query_with_its_parameters(warehouse: Database) -> None:
    """From the time before (01:00 UTC, the clocks went forward) to this one (00:00 UTC)."""
    query = (
        "SELECT id, note AS prompt FROM visits WHERE made >= :previous AND made < :scheduled_for "
        "ORDER BY id -- it's :over"
    )
    assert read(ask(query), ignore_unknown=True) == ["note 1", "note 2"]
    builder = make_builder(template="{{ id }}/{{ firing }}", variables=NIGHT.variables())
    same = query.replace("id, note AS prompt", "*, :firing AS firing")
    assert read(ask(same), builder=builder) == ["1/17", "2/17"]
    assert read(ask("SELECT '12:30 :x; 100%' AS prompt;")) == ["12:30 :x; 100%"]
    first = Moment(NIGHT.scheduled_for, None, 1)
    nothing = "SELECT 'a' AS prompt WHERE :previous IS NULL"
    if warehouse.dialect == "postgresql":
        nothing = "SELECT 'a' AS prompt WHERE :previous::timestamptz IS NULL"
    assert read(ask(nothing), first) == ["a"]


def test_rows_become_a_job(warehouse: Database, make_settings: Any) -> None:
    builder = make_builder(template="Summarise: {{ note }}")
    options = ReadOptions(builder=builder, keep=frozenset({"id"}))
    with open_source(ask("SELECT * FROM visits"), NIGHT, options) as (rows, name):
        of_job = JobOptions(checkpoint_key="demo")
        job = submit(warehouse, make_settings(), rows, of_job, source=name)
    assert job.requests == 4
    with warehouse.read() as connection:
        bodies = connection.execute(select(Request.body).order_by(Request.index)).scalars().all()
    assert bodies[3] == {"prompt": "Summarise: note 3", "metadata": {"id": 3}}


def test_what_columns_become(warehouse: Database) -> None:
    def columns(query: str) -> str:
        (got,) = read(ask(query), builder=make_builder(template="{{ row | tojson }}"))
        return got

    assert columns("SELECT 1 AS a, 1.5 AS b, NULL AS c, 'é' AS d") == (
        '{"a": 1, "b": 1.5, "c": null, "d": "é"}'
    )
    if warehouse.dialect == "sqlite":
        return
    assert columns(
        "SELECT 12.50::numeric AS a, 1e20::numeric AS b, 0.1234567890123456789 AS c, true AS d, "
        "'2026-03-30'::date AS e, '2026-03-30 02:00+02'::timestamptz AT TIME ZONE 'UTC' AS f, "
        f"'{uuid.UUID(int=1)}'::uuid AS g, ARRAY[1, 2] AS h, '{{\"x\": [1]}}'::jsonb AS i"
    ) == (
        '{"a": 12.5, "b": 100000000000000000000, "c": "0.1234567890123456789", "d": true, '
        '"e": "2026-03-30", "f": "2026-03-30T00:00:00", '
        '"g": "00000000-0000-0000-0000-000000000001", "h": [1, 2], "i": {"x": [1]}}'
    )


def test_a_row_that_cannot_be_used_is_named_by_its_number(warehouse: Database) -> None:
    binary = "CAST('x' AS blob)" if warehouse.dialect == "sqlite" else "'x'::bytea"
    first, second = read(
        ask(f"SELECT 'a' AS prompt, NULL AS b UNION ALL SELECT 'c', {binary}"),
        keep=frozenset({"b"}),
    )
    assert first == "a"
    assert second.startswith("[row 2: column 'b' holds bytes")
    (bad,) = read(ask("SELECT 1 AS prompt"))
    assert bad.startswith("[row 1: prompt must be a string")


def test_a_query_can_only_read(warehouse: Database) -> None:
    writes = "WITH gone AS (DELETE FROM visits RETURNING 1) SELECT 'a' AS prompt FROM gone"
    message = refusal(ask(writes))
    assert message.startswith(f"the query on {WAREHOUSE} failed: ")
    if warehouse.dialect == "postgresql":
        assert "read-only transaction" in refusal(ask("SELECT lo_create(0)::text AS prompt"))
    with warehouse.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM visits")).scalar_one() == 4


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("SELECT nothing FROM visits", "the query on WAREHOUSE_URL failed: "),
        (
            "SELECT note AS prompt FROM visits WHERE id > 99",
            "the query on WAREHOUSE_URL gave no rows",
        ),
        (
            "SELECT id, note AS id FROM visits",
            "the query on WAREHOUSE_URL: two columns are called id",
        ),
    ],
)
def test_a_query_that_fails(warehouse: Database, query: str, message: str) -> None:
    assert refusal(ask(query)).startswith(message)


def test_a_database_that_cannot_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    query = ask("SELECT 1 AS prompt")
    assert refusal(query).startswith("WAREHOUSE_URL is not set here")
    for url, message in {
        "hush": "WAREHOUSE_URL holds no URL",
        "mysql://u:hush@h/d": "WAREHOUSE_URL: 'mysql' is not supported",
        "postgresql://u:hush@127.0.0.1:1/d": "the query on WAREHOUSE_URL failed: connection",
        f"sqlite:///{tmp_path}/absent.db": "the query on WAREHOUSE_URL failed: unable to open",
    }.items():
        monkeypatch.setenv(WAREHOUSE, url)
        said = refusal(query)
        assert said.startswith(message), said
        assert "hush" not in said
    assert not (tmp_path / "absent.db").exists()


def test_rows_are_streamed(warehouse: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """30,000 rows of 500 bytes in a few MiB; all at once they would be 15."""
    monkeypatch.setattr(queries, "_SPOOL_IN_MEMORY", 2**16)
    count = 30_000
    series = (
        "WITH RECURSIVE s(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < 30000) "
        if warehouse.dialect == "sqlite"
        else "WITH s AS (SELECT n FROM generate_series(1, 30000) n) "
    )
    tracemalloc.start()
    try:
        source = ask(f"{series} SELECT '{'x' * 490}' || n AS prompt FROM s")
        with open_source(source, NIGHT, ReadOptions()) as (rows, _):
            assert sum(1 for _ in rows) == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * 2**20, peak


def test_an_aware_moment_is_what_the_query_sees(warehouse: Database) -> None:
    as_text = "CAST(:scheduled_for AS text)"
    if warehouse.dialect == "postgresql":
        as_text = "to_char(:scheduled_for::timestamptz AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')"
    (seen,) = read(ask(f"SELECT {as_text} AS prompt"))
    assert seen == f"{NIGHT.scheduled_for.astimezone(UTC):%Y-%m-%d %H:%M:%S}"
