"""Every shape of row, and every message about one in full."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from nightherd.errors import ParameterError
from nightherd.params import parse_body, parse_params
from producer.inputs.reader import Reader, ReadOptions, Row
from tests.producer.inputs.reading import KEEP_HINT, USER, one, problem, read


class TestShapes:
    @pytest.mark.parametrize(
        ("row", "body"),
        [
            ("Once", {"prompt": "Once"}),
            ("", {"prompt": ""}),
            ({"prompt": "Once"}, {"prompt": "Once"}),
            ({"prompt": "Once", "messages": None}, {"prompt": "Once"}),
            ({"prompt": [1, 2]}, {"prompt": [1, 2]}),
            ({"messages": [USER]}, {"messages": [USER]}),
            ({"prompt": "Once", "messages": [USER]}, {"prompt": "Once", "messages": [USER]}),
            (
                {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
                {"messages": [USER]},
            ),
            ({"messages": [{**USER, "name": "Ann"}]}, {"messages": [{**USER, "name": "Ann"}]}),
            ({"prompt": "a", "metadata": {"x": [1]}}, {"prompt": "a", "metadata": {"x": [1]}}),
        ],
    )
    def test_json(self, row: object, body: dict[str, Any]) -> None:
        assert one(row) == Row(1, body, None, None)

    def test_parameters_stand_in_the_row_or_in_params(self) -> None:
        row = {"prompt": "a", "max_new_tokens": 5, "params": {"temperature": 0, "stop": "x"}}
        assert one(row).params == {"max_tokens": 5, "temperature": 0.0, "stop": ["x"]}

    def test_null_parameters_are_none(self) -> None:
        assert one({"prompt": "a", "temperature": None, "params": {}}).params is None

    def test_text(self) -> None:
        data = b"\xef\xbb\xbfOnce upon\r\n\n  \t\n  two \n\xc2\xa0\nthree"
        assert read(data, "in.txt") == [
            Row(1, {"prompt": "Once upon"}, None, None),
            Row(4, {"prompt": "  two "}, None, None),
            Row(6, {"prompt": "three"}, None, None),
        ]

    def test_blank_lines_and_a_byte_order_mark_in_jsonl(self) -> None:
        data = b'\xef\xbb\xbf\r\n {"prompt": "a"} \r\n\n"b"'
        assert read(data) == [
            Row(2, {"prompt": "a"}, None, None),
            Row(4, {"prompt": "b"}, None, None),
        ]

    def test_a_very_long_line(self) -> None:
        text = "long " * 1_000_000
        assert one({"prompt": text}).body == {"prompt": text}

    def test_escapes(self) -> None:
        assert read(r'"\ud83d\ude00 \\u0000 \u00e9"')[0] == Row(
            1, {"prompt": "😀 \\u0000 é"}, None, None
        )


class TestOpenAIBatch:
    def line(self, body: dict[str, Any], **more: Any) -> dict[str, Any]:
        url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        return {"custom_id": "r-1", "method": "POST", "url": url, "body": body, **more}

    def test_a_chat(self) -> None:
        ignored = {"model": "m-1", "user": "u", "store": True, "service_tier": "auto"}
        body = {**ignored, "messages": [USER], "max_completion_tokens": 9, "stream": False}
        assert one(self.line(body)) == Row(1, {"messages": [USER]}, {"max_tokens": 9}, "r-1")

    def test_a_completion_with_metadata(self) -> None:
        row = one(self.line({"prompt": "Once", "stop": ["x"], "metadata": {"a": "b"}}))
        assert row.body == {"prompt": "Once", "metadata": {"a": "b"}}
        assert row.params == {"stop": ["x"]}

    def test_only_the_body_is_needed(self) -> None:
        assert one({"body": {"prompt": "a"}}) == Row(1, {"prompt": "a"}, None, None)

    def test_models_are_collected(self) -> None:
        lines = [json.dumps({"body": {"prompt": "a", "model": f"m{i % 2}"}}) for i in range(5)]
        reader = Reader(io.BytesIO("\n".join(lines).encode()), "in.jsonl")
        assert len(list(reader)) == 5
        assert reader.models == {"m0", "m1"}

    def test_a_system_message_goes_before(self) -> None:
        row = one(self.line({"messages": [USER], "n": 2}), system="Be brief.")
        assert row.body == {"messages": [{"role": "system", "content": "Be brief."}, USER]}
        assert row.params == {"n": 2}

    def test_kept_columns_come_from_the_body_and_beside_it(self) -> None:
        row = self.line({"prompt": "a", "tools": [1]}, topic="b")
        assert one(row, keep=("tools", "topic")).body == {
            "prompt": "a",
            "metadata": {"tools": [1], "topic": "b"},
        }

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"body": 3}, "body must be an object, it is a number"),
            ({"method": "GET", "body": {}}, "method must be POST, got 'GET'"),
            (
                {"url": "/v1/embeddings", "body": {}},
                "url must be /v1/chat/completions or /v1/completions, got '/v1/embeddings'",
            ),
            (
                {"url": [], "body": {}},
                "url must be /v1/chat/completions or /v1/completions, got []",
            ),
            (
                {"body": {"prompt": "a", "stream": True}},
                "stream is on; a job streams nothing, leave it out of the body",
            ),
            (
                {"url": "/v1/completions", "body": {"messages": [USER]}},
                "the body has no prompt, which /v1/completions needs",
            ),
            (
                {"url": "/v1/chat/completions", "body": {"prompt": "a"}},
                "the body has no messages, which /v1/chat/completions needs",
            ),
            ({"body": {"n": 1}}, "no prompt and no messages (columns: n)"),
            (
                {"body": {"prompt": "a", "tools": []}},
                "unknown key 'tools' " + KEEP_HINT.format("tools"),
            ),
            (
                {"url": "/v1/completions", "body": {"prompt": "a"}, "x": 1},
                "unknown key 'x' " + KEEP_HINT.format("x"),
            ),
            (
                {"body": {"prompt": "a", "max_tokens": 0}},
                "max_tokens must be greater than or equal to 1, got 0",
            ),
        ],
    )
    def test_problems(self, row: object, message: str) -> None:
        assert problem(row) == message


NO_ROW = 'is no row; {"prompt": …}, {"messages": […]} and a string are'


class TestProblems:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ('{"prompt"', "not JSON: Expecting ':' delimiter at column 10"),
            ("Hello", "not JSON: Expecting value at column 1"),
            ('"a" "b"', "not JSON: more text after the value, at column 4"),
            ('{"prompt": NaN}', "not JSON: NaN is no JSON number"),
            (
                '{"prompt": "a", "metadata": {"x": -Infinity}}',
                "not JSON: -Infinity is no JSON number",
            ),
            ('{"prompt": "a", "metadata": {"x": 1e999}}', "the number 1e999 is too large"),
            ('{"prompt": ' + "9" * 5000 + "}", "a number has more digits than can be read"),
            ('{"prompt": ' + "[" * 9999, "nested more than 100 levels deep"),
            (
                '{"prompt": "a", "metadata": {"x": ' + "[" * 100 + "]" * 100 + "}}",
                "nested more than 100 levels deep",
            ),
            (
                r'{"prompt": "\u0000"}',
                "a string holds a NUL character (U+0000), which SQL databases cannot store",
            ),
            (
                r'{"prompt": "a", "metadata": {"\ud800": 1}}',
                "a string holds half of a surrogate pair (U+D800), which is no text",
            ),
            ("7", f"a number {NO_ROW}"),
            ("null", f"null {NO_ROW}"),
            ("true", f"true {NO_ROW}"),
            ({}, "no prompt and no messages (it has no columns)"),
            ({"prompt": None}, "no prompt and no messages (columns: prompt)"),
            (
                {"custom_id": "a", "question": "b"},
                (
                    "no prompt and no messages (columns: custom_id, question); "
                    "a template makes one: --template '{{ question }}'"
                ),
            ),
            (
                {"promt": "a"},
                "unknown key 'promt'; did you mean prompt? " + KEEP_HINT.format("promt"),
            ),
            (
                {"prompt": "a", "temprature": 1},
                "unknown key 'temprature'; did you mean temperature? "
                + KEEP_HINT.format("temprature"),
            ),
            (
                {"prompt": "a", "a\nb\u202e": 1},
                "unknown key 'a b' " + KEEP_HINT.format("a b"),
            ),
            (
                {"prompt": "a", "params": 3},
                "params must be an object of parameters, it is a number",
            ),
            (
                {"prompt": "a", "params": {"n": 1}, "n": 1},
                "n stands in the row and in its params; give one",
            ),
            ({"prompt": "a", "params": {"tempera": 1}}, None),
            (
                {"prompt": "a", "temperature": -1},
                "temperature must be greater than or equal to 0, got -1",
            ),
            (
                {"prompt": "a", "max_tokens": 0},
                "max_tokens must be greater than or equal to 1, got 0",
            ),
            ({"prompt": "a", "top_p": 3}, "top_p must be less than or equal to 1, got 3"),
            ({"prompt": ["a", "b"]}, "prompt holds several prompts; write a line for each"),
            ({"prompt": [[1], [2]]}, "prompt holds several prompts; write a line for each"),
            ({"prompt": []}, "prompt has no token ids"),
            ({"prompt": [1, -1]}, "prompt must be a string or token ids from 0 up, got -1"),
            ({"prompt": [True]}, "prompt must be a string or token ids from 0 up, got True"),
            ({"prompt": 3}, "prompt must be a string or token ids, it is a number"),
            ({"prompt": {}}, "prompt must be a string or token ids, it is an object"),
            ({"messages": "Hi"}, None),
            ({"messages": []}, None),
            ({"messages": [{"role": "user"}]}, None),
            ({"messages": [{"role": "", "content": "a"}]}, None),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, None),
            ({"prompt": "a", "metadata": 3}, None),
            ({"prompt": "a", "custom_id": ""}, "custom_id has 0 characters; it may have 1 to 512"),
            (
                {"prompt": "a", "custom_id": "x" * 513},
                "custom_id has 513 characters; it may have 1 to 512",
            ),
            ({"prompt": "a", "custom_id": 1.5}, "custom_id must be a string, it is a number"),
            ({"prompt": "a", "custom_id": True}, "custom_id must be a string, it is true"),
        ],
    )
    def test_message(self, row: object, message: str | None) -> None:
        got = problem(row)
        assert got.isprintable()
        if message is None:
            # The words are those of nightherd.params.
            assert isinstance(row, dict)
            params = row.get("params")
            with pytest.raises(ParameterError) as error:
                parse_body(row) if params is None else parse_params(params)
            message = str(error.value)
        assert got == message

    def test_a_long_value_is_cut_short(self) -> None:
        got = problem({"prompt": "a", "response_format": "x" * 10_000})
        assert len(got) <= 400
        assert got.endswith("…")

    def test_nul_in_text(self) -> None:
        assert problem("a\0b", name="a.txt") == (
            "the text holds a NUL character (U+0000), which SQL databases cannot store"
        )

    def test_good_rows_around_bad_ones(self) -> None:
        got = read('{"prompt": "a"}\nnoise\n{"prompt": "b"}\n{"foo": 1}')
        assert [type(row).__name__ for row in got] == ["Row", "RowProblem", "Row", "RowProblem"]
        assert [row.line for row in got] == [1, 2, 3, 4]
        assert str(got[3]) == "line 4: no prompt and no messages (columns: foo)"


class TestKeepAndIgnore:
    def test_keep(self) -> None:
        row = {"prompt": "a", "topic": "b", "id": None, "metadata": {"m": 1}}
        assert one(row, keep=("topic", "id", "absent")).body == {
            "prompt": "a",
            "metadata": {"m": 1, "topic": "b", "id": None},
        }

    def test_keep_with_a_template(self) -> None:
        assert one({"q": "a", "answer": "b"}, template="{{ q }}", keep=("answer",)).body == {
            "prompt": "a",
            "metadata": {"answer": "b"},
        }

    def test_keep_the_prompt(self) -> None:
        assert one({"prompt": "a"}, keep=("prompt",)).body == {
            "prompt": "a",
            "metadata": {"prompt": "a"},
        }

    def test_keep_the_text_of_a_plain_line(self) -> None:
        assert one("a", template="<{{ text }}>", keep=("text",)).body == {
            "prompt": "<a>",
            "metadata": {"text": "a"},
        }

    def test_unseen(self) -> None:
        options = ReadOptions(keep=frozenset({"topic", "typo"}))
        reader = Reader(io.BytesIO(b'"a"\n{"prompt": "a", "topic": 1}'), "in.jsonl", options)
        assert len(list(reader)) == 2
        assert reader.unseen == {"typo"}

    def test_keep_against_metadata(self) -> None:
        row = {"prompt": "a", "x": 1, "metadata": {"x": 2}}
        assert problem(row, keep=("x",)) == "x is a column to keep and a key of metadata; give one"

    def test_ignore_unknown(self) -> None:
        assert one({"prompt": "a", "x": 1}, ignore_unknown=True).body == {"prompt": "a"}
        assert problem({"x": 1}, ignore_unknown=True) == "no prompt and no messages (columns: x)"

    def test_ignore_unknown_does_not_ignore_bad_parameters(self) -> None:
        assert "top_p" in problem({"prompt": "a", "top_p": 3}, ignore_unknown=True)


class TestBuilders:
    def test_columns_are_data_whatever_their_names(self) -> None:
        row = {"max_tokens": "a", "metadata": 1, "params": 2, "messages": 3, "custom_id": "c"}
        assert one(row, template="{{ max_tokens }}{{ messages }}") == Row(
            1, {"prompt": "a3"}, None, "c"
        )

    def test_a_missing_column_has_its_line(self) -> None:
        data = '{"question": "a"}\n{"a": 1, "b": 2}\n"c"'
        assert [str(row) for row in read(data, template="{{ question }}")[1:]] == [
            "line 2: column 'question' is not there (columns: a, b)",
            "line 3: column 'question' is not there (columns: text)",
        ]

    def test_plain_text_has_the_column_text(self) -> None:
        assert read("a\nb", "a.txt", template="<{{ text }}>")[1] == Row(
            2, {"prompt": "<b>"}, None, None
        )

    def test_a_system_message_leaves_requests_their_parameters(self) -> None:
        row = one({"prompt": "a", "max_tokens": 3, "lang": "Dutch"}, system="Write {{ lang }}.")
        assert row.params == {"max_tokens": 3}
        assert row.body == {
            "messages": [
                {"role": "system", "content": "Write Dutch."},
                {"role": "user", "content": "a"},
            ]
        }

    def test_an_unused_column_beside_a_system_message(self) -> None:
        assert problem({"prompt": "a", "topic": 1}, system="Be brief.") == (
            "unknown key 'topic' " + KEEP_HINT.format("topic")
        )

    @pytest.mark.parametrize("row", ["a", {"prompt": "a"}, {"text": "a"}])
    def test_the_user_message_is_the_prompt_or_the_text(self, row: object) -> None:
        assert one(row, chat=True).body == {"messages": [{"role": "user", "content": "a"}]}

    def test_a_task(self) -> None:
        body = one({"article": "A long text.", "id": 3}, task="summarize", keep=("id",)).body
        assert set(body) == {"prompt", "messages", "metadata"}
        assert parse_body(body) == body
