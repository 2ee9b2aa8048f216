"""Files and their formats, custom_ids, and that no input whatever ends in an exception."""

from __future__ import annotations

import gc
import io
import json
import os
import sqlite3
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightherd.errors import InputError, NightherdError, ParameterError
from nightherd.params import parse_body, parse_params
from producer.inputs import reader
from producer.inputs.reader import (
    Reader,
    ReadOptions,
    Row,
    RowProblem,
    open_input,
)
from producer.tasks.registry import make_builder
from tests.producer.inputs.reading import TEXT_HINT, USER, one, problem, read, read_file

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data"
GSM8K = DATA / "gsm8k_200.jsonl"
MT_BENCH = DATA / "mt_bench_questions.jsonl"


class TestFormat:
    @pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "A.JSONL", "-", "a.data"])
    def test_jsonl(self, name: str) -> None:
        assert read('"a"\n{"prompt": "b"}', name)[1] == Row(2, {"prompt": "b"}, None, None)

    @pytest.mark.parametrize(
        "first",
        ["Hello", "[INST] Hello", "{{ Hello }}", "{ Hello }", '"Hello," she said', "[1, 2]", "7"],
    )
    def test_text_by_the_first_line(self, first: str) -> None:
        got = read(f'\n{first}\n{{"prompt": "b"}}', "-")
        assert got == [
            Row(2, {"prompt": first}, None, None),
            Row(3, {"prompt": '{"prompt": "b"}'}, None, None),
        ]

    def test_text_by_extension_or_option(self) -> None:
        assert one("a", name="a.txt").body == {"prompt": '"a"'}
        assert one("a", format="text").body == {"prompt": '"a"'}
        assert one("a", name="a.txt", format="jsonl").body == {"prompt": "a"}

    def test_broken_json_on_standard_input_is_not_taken_for_text(self) -> None:
        assert problem('{"prompt": "a"', name="-") == (
            f"not JSON: Expecting ',' delimiter at column 15 {TEXT_HINT}"
        )

    def test_the_hint_is_for_the_guess_alone(self) -> None:
        first, second = read('{"prompt": 1}\n{"prompt": 1}', "-")
        message = "prompt must be a string or token ids, it is a number"
        assert str(first) == f"line 1: {message} {TEXT_HINT}"
        assert str(second) == f"line 2: {message}"

    def test_a_table(self) -> None:
        with pytest.raises(InputError) as error:
            read("a,b\n1,2", "rows.csv")
        assert str(error.value) == (
            f"rows.csv: tables are not read; write it as JSONL, one object a line {TEXT_HINT}"
        )
        assert len(read("a,b\n1,2", "rows.csv", format="text")) == 2


class TestWholeFile:
    @pytest.mark.parametrize("data", ["", "\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\t\n"])
    def test_empty(self, data: str | bytes) -> None:
        with pytest.raises(InputError) as error:
            read(data, "prompts.jsonl")
        assert str(error.value) == "prompts.jsonl is empty: it has no line with a prompt"

    @pytest.mark.parametrize("data", ['[{"prompt": "a"},\n{"prompt": "b"}]', '\n[\n"a"\n]', "[]"])
    def test_an_array(self, data: str) -> None:
        (got,) = read(data, "in.json")
        assert isinstance(got, RowProblem)
        assert got.message == "a JSON array; write one JSON value a line (jq -c '.[]' does that)"

    def test_an_object_over_several_lines(self) -> None:
        assert [str(row) for row in read('{\n"prompt": "a"\n}')] == [
            "line 1: a JSON value over several lines; write one a line (jq -c . does that)"
        ]

    @pytest.mark.parametrize(
        ("start", "what"),
        [
            (b"\xff\xfea\0\n\0", "UTF-16: iconv -f UTF-16 -t UTF-8 converts it"),
            (b"\xfe\xff\0a\n\0", "UTF-16: iconv -f UTF-16 -t UTF-8 converts it"),
            (b"\x1f\x8b\x08\x00\n", "gzip data: gunzip -c unpacks it"),
            (b"\x28\xb5\x2f\xfd\n", "zstd data: zstd -dc unpacks it"),
            (b"PK\x03\x04\n", "a zip archive: unpack it first"),
            (b"PAR1\x15\n", "a Parquet file: write it as JSONL first"),
        ],
    )
    def test_other_formats(self, start: bytes, what: str) -> None:
        assert read(start * 3) == [RowProblem(1, f"not UTF-8 text but {what}")]

    def test_noise(self) -> None:
        assert [str(row) for row in read(b"\x89PNG\n{}\n\xff\xff\xff", "-")] == [
            "line 1: not UTF-8 text",
            "line 2: no prompt and no messages (it has no columns) " + TEXT_HINT,
            "line 3: not UTF-8 text",
        ]

    def test_invalid_utf8_in_one_line(self) -> None:
        got = read(b'"a"\n\n"caf\xe9"\n"b"')
        assert got[1] == RowProblem(3, "not UTF-8 text")
        assert got[2] == Row(4, {"prompt": "b"}, None, None)

    def test_cannot_be_read_further(self) -> None:
        class Broken(io.BytesIO):
            def __next__(self) -> bytes:
                line = super().readline()
                if not line:
                    raise OSError(5, "Input/output error")
                return line

        rows = iter(Reader(Broken(b'"a"\n'), "in.jsonl"))
        assert next(rows) == Row(1, {"prompt": "a"}, None, None)
        with pytest.raises(InputError) as error:
            next(rows)
        assert str(error.value) == "in.jsonl cannot be read further: Input/output error"


class TestOpen:
    def test_no_such_file(self) -> None:
        with pytest.raises(InputError) as error:
            open_input("no/such.jsonl")
        assert str(error.value) == "no/such.jsonl: no such file"

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError) as error:
            open_input(tmp_path)
        assert str(error.value) == f"{tmp_path} is a folder; give a file of prompts"

    def test_below_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("a")
        with pytest.raises(InputError) as error:
            open_input(path / "x")
        assert str(error.value) == f"{path}/x cannot be read: Not a directory"

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_not_allowed(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch(mode=0)
        with pytest.raises(InputError) as error:
            open_input(path)
        assert str(error.value) == f"{path} cannot be read: Permission denied"

    def test_an_impossible_name(self) -> None:
        with pytest.raises(InputError) as error:
            open_input("a\0b")
        assert str(error.value) == "a b cannot be read: embedded null byte"

    def test_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "in.jsonl"
        path.write_text('"a"\n')
        assert list(read_file(path)) == [Row(1, {"prompt": "a"}, None, None)]


class TestCustomIds:
    def test_an_integer_becomes_a_string(self) -> None:
        assert one({"prompt": "a", "custom_id": 7}).custom_id == "7"

    def test_null_is_none(self) -> None:
        data = '{"prompt": "a", "custom_id": null}\n' * 2
        assert [row.custom_id for row in read(data) if isinstance(row, Row)] == [None, None]

    def test_512_characters(self) -> None:
        assert one({"prompt": "a", "custom_id": "é" * 512}).custom_id == "é" * 512

    def test_a_duplicate_names_both_lines(self) -> None:
        rows: list[object] = [
            {"prompt": "a", "custom_id": "1"},
            {"messages": [USER], "custom_id": "a"},
            {"prompt": "a"},
            {"prompt": "a", "custom_id": "b"},
            {"prompt": "a", "custom_id": 1},
            {"body": {"prompt": "x"}, "custom_id": "c"},
            {"body": {"prompt": "x"}, "custom_id": "a"},
        ]
        got = read("\n".join(json.dumps(row) for row in rows))
        assert [str(row) for row in got if isinstance(row, RowProblem)] == [
            "line 5: custom_id '1' was already used on line 1",
            "line 7: custom_id 'a' was already used on line 2",
        ]

    def test_with_a_template_too(self) -> None:
        data = '{"q": "a", "custom_id": "x"}\n' * 2
        first, second = read(data, template="{{ q }} {{ custom_id }}")
        assert first == Row(1, {"prompt": "a x"}, None, "x")
        assert str(second) == "line 2: custom_id 'x' was already used on line 1"

    def test_a_disk_that_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full() -> sqlite3.Connection:
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(reader.CustomIds, "_create", staticmethod(full))
        with pytest.raises(NightherdError) as error:
            read('{"prompt": "a", "custom_id": "x"}')
        assert str(error.value) == (
            "custom_ids cannot be compared in a temporary file: database or disk is full "
            "(SQLITE_TMPDIR names another folder for it)"
        )

    def test_the_memory_is_constant(self) -> None:
        def lines(count: int) -> Iterator[bytes]:
            for i in range(count):
                yield b'{"prompt": "Once upon a time", "custom_id": "row-%d"}\n' % i

        def peak(count: int) -> int:
            gc.collect()
            tracemalloc.start()
            try:
                # Any iterable of lines does; a file of them would be in the measurement.
                file = cast(BinaryIO, lines(count))
                assert [
                    row for row in Reader(file, "in.jsonl") if isinstance(row, RowProblem)
                ] == []
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

        peak(100)
        assert peak(20_000) < peak(200) + 100_000


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", ""]), "content": st.text() | json_values},
        optional={"name": st.text()},
    )
    | json_values,
    max_size=3,
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text() | st.lists(st.integers() | json_values, max_size=3) | json_values,
        "messages": messages,
        "metadata": st.dictionaries(st.text(), json_values, max_size=2) | json_values,
    },
)
request_rows = st.builds(
    lambda body, params, more: {**more, **params, **body},
    bodies,
    st.dictionaries(
        st.sampled_from(["temperature", "max_new_tokens", "stop", "n", "seed", "logit_bias"]),
        st.sampled_from([0, 1, 0.5, "x", ["y"], {"3": 1}, None]),
        max_size=2,
    ),
    st.dictionaries(
        st.sampled_from(["custom_id", "params", "body", "url"]), json_values, max_size=1
    ),
)


@settings(deadline=None)
@given(bodies)
def test_the_fast_path_equals_the_slow_one(body: dict[str, Any]) -> None:
    try:
        expected: dict[str, Any] | None = parse_body(body)
    except (ParameterError, ValueError):
        expected = None
    if expected is not None and "\\u0000" in json.dumps(expected):
        expected = None
    (got,) = read(json.dumps(body))
    assert (got.body if isinstance(got, Row) else None) == expected


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=30) | request_rows.map(lambda row: json.dumps(row).encode())).map(
        b"\n".join
    ),
    st.sampled_from(["in.jsonl", "in.txt", "-"]),
    st.sampled_from(
        [{}, {"template": "{{ prompt }}"}, {"system": "Hi"}, {"chat": True}, {"task": "answer"}]
    ),
    st.booleans(),
)
def test_any_input_is_rows_and_problems(
    data: bytes, name: str, building: dict[str, Any], ignore_unknown: bool
) -> None:
    if not data.decode(errors="replace").removeprefix("\ufeff").strip():
        with pytest.raises(InputError, match="is empty: it has no line with a prompt"):
            read(data, name, **building)
        return
    got = read(data, name, keep=("prompt",), ignore_unknown=ignore_unknown, **building)
    assert got
    lines = [row.line for row in got]
    assert lines == sorted(set(lines))
    for row in got:
        if isinstance(row, RowProblem):
            assert str(row).isprintable()
        else:
            # What is stored is accepted again, unchanged, and is UTF-8.
            json.dumps(row.body, ensure_ascii=False, allow_nan=False).encode()
            assert parse_body(row.body) == row.body
            assert row.params is None or parse_params(row.params) == row.params


@pytest.mark.skipif(not GSM8K.exists(), reason="the real inputs are not beside the repository")
class TestRealInputs:
    def test_gsm8k_by_template(self) -> None:
        options = ReadOptions(builder=make_builder(template="{{ question }}"))
        rows = list(read_file(GSM8K, options))
        questions = [json.loads(line)["question"] for line in GSM8K.read_text("utf-8").splitlines()]
        assert len(questions) == 200
        assert rows == [Row(i, {"prompt": q}, None, None) for i, q in enumerate(questions, 1)]

    def test_gsm8k_without_one(self) -> None:
        rows = list(read_file(GSM8K))
        assert {str(row).partition(": ")[2] for row in rows} == {
            (
                "no prompt and no messages (columns: question, answer); "
                "a template makes one: --template '{{ question }}'"
            )
        }

    def test_mt_bench_first_turns_as_chats(self) -> None:
        builder = make_builder(template="{{ turns[0] }}", chat=True)
        options = ReadOptions(builder=builder, keep=frozenset({"question_id", "category"}))
        rows = list(read_file(MT_BENCH, options))
        first = json.loads(MT_BENCH.read_text("utf-8").splitlines()[0])
        assert len(rows) == 80
        assert isinstance(rows[0], Row)
        assert rows[0].body == {
            "messages": [{"role": "user", "content": first["turns"][0]}],
            "metadata": {"category": "writing", "question_id": 81},
        }
