"""Templates in their sandbox, their messages, and the bodies that are made with them."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nightherd.errors import UsageError
from producer.prompts.builder import RowBuilder
from producer.prompts.template import MAX_CHARS, BadRowError, compile_template, one_line, unstorable
from producer.tasks.registry import make_builder

ROW: dict[str, Any] = {
    "question": "Why?",
    "turns": ["a", "b"],
    "meta": {"items": 3, "é": "ü<&"},
    "my column": "c",
    "nothing": None,
}
COLUMNS = "(columns: question, turns, meta, my column, nothing)"


def render(text: str, columns: dict[str, Any] | None = None) -> str:
    return compile_template(text, "--template").render(ROW if columns is None else columns)


def refusal(text: str) -> str:
    with pytest.raises(BadRowError) as error:
        render(text)
    assert str(error.value).isprintable()
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no columns\n", "no columns\n"),
        ("Q: {{ question }}\n", "Q: Why?\n"),
        ("{{ turns[0] }}{{ turns | join('-') }}", "aa-b"),
        ("{{ row['my column'] }}", "c"),
        ("{{ meta['items'] }}", "3"),
        ("{{ meta | tojson }}", '{"items": 3, "é": "ü<&"}'),
        ("{{ turns | tojson(2) }}", '[\n  "a",\n  "b"\n]'),
        ("{{ meta['é'] }}", "ü<&"),
        ("{{ nothing or '' }}|{{ absent | default('x') }}|{{ absent is defined }}", "|x|False"),
        ("{% if nothing %}a{% else %}b{% endif %}", "b"),
        ("{% for turn in turns %}{{ loop.index }}{{ turn }}{% endfor %}", "1a2b"),
        ("{{ turns }} {{ 1.5 }} {{ true }}", "['a', 'b'] 1.5 True"),
        ("{{ 'ab' * 3 }}{{ 2 ** 10 }}", "ababab1024"),
        ("{{ question | escape }}", "Why?"),
        ("{# a remark #}{{ '{{' }}", "{{"),
    ],
)
def test_render(text: str, expected: str) -> None:
    assert render(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ nope }}", f"column 'nope' is not there {COLUMNS}"),
        ("{{ nope.deeper }}", f"column 'nope' is not there {COLUMNS}"),
        ("{{ nope.__class__ }}", f"column 'nope' is not there {COLUMNS}"),
        ("{{ nope | tojson }}", f"column 'nope' is not there {COLUMNS}"),
        ("{% if nope %}a{% endif %}", f"column 'nope' is not there {COLUMNS}"),
        ("{{ dict }}", f"column 'dict' is not there {COLUMNS}"),
        ("{{ meta.nope }}", "--template: key 'nope' is not there (keys: items, é)"),
        ("{{ turns[7] }}", "--template: list object has no element 7"),
        ("{{ question.nope }}", "--template: 'str object' has no attribute 'nope'"),
        (
            "{{ nothing }}",
            (
                "--template: a value is null (null columns: 'nothing'); "
                "{{ … or '' }} writes nothing for it"
            ),
        ),
        (
            "{{ meta.items }}",
            (
                "--template: a builtin_function_or_method is no text; "
                "a key of that name is reached by ['name']"
            ),
        ),
        (
            "{{ turns | map('upper') }}",
            "--template: a generator is no text; | list or | join makes one of it",
        ),
        (
            "{{ ''.__class__.__mro__ }}",
            "--template: access to attribute '__class__' of 'str' object is unsafe.",
        ),
        (
            "{{ turns.append(1) }}",
            "--template: access to attribute 'append' of 'list' object is unsafe.",
        ),
        ("{{ 1 / 0 }}", "--template: ZeroDivisionError: division by zero"),
        (
            "{{ question + 1 }}",
            '--template: TypeError: can only concatenate str (not "int") to str',
        ),
        ("{{ 'a' * 10**9 }}", "--template: what '*' makes is too large"),
        ("{{ 10**9 * 'a' }}", "--template: what '*' makes is too large"),
        ("{{ 9 ** 99999 }}", "--template: what '**' makes is too large"),
        ("{{ 'a' | center(10**15) }}", "--template: MemoryError"),
        (
            "{% for i in range(10**6) %}a{% endfor %}",
            (
                "--template: OverflowError: Range too big. The sandbox blocks ranges larger than "
                "MAX_RANGE (100000)."
            ),
        ),
        (
            (
                "{% for i in range(99999) %}{% for j in range(99999) %}{{ question }}"
                "{% endfor %}{% endfor %}"
            ),
            "--template: it writes more than 10,000,000 characters",
        ),
        (
            r"{{ '\x00' }}",
            "--template writes a NUL character (U+0000), which SQL databases cannot store",
        ),
        (
            r"{{ '\ud800' }}",
            "--template writes half of a surrogate pair (U+D800), which is no text",
        ),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "--template: RecursionError: maximum recursion depth exceeded",
        ),
    ],
)
def test_refused_row(text: str, message: str) -> None:
    start = time.monotonic()
    assert refusal(text).startswith(message)
    assert time.monotonic() - start < 10


def test_no_columns_at_all() -> None:
    with pytest.raises(BadRowError) as error:
        render("{{ a }}", {})
    assert str(error.value) == "column 'a' is not there (it has no columns)"


def test_many_columns_are_cut_short() -> None:
    with pytest.raises(BadRowError) as error:
        render("{{ nope }}", {f"c{i}": i for i in range(100)})
    assert str(error.value).endswith("c18, c19, …)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{{ question",
            "--template, line 1: unexpected end of template, expected 'end of print statement'.",
        ),
        ("a\nb\n{{ x | nofilter }}", "--template, line 3: No filter named 'nofilter'."),
        (
            "{% include 'x' %}",
            "--template cannot include or import other templates; write it out",
        ),
        (
            "a\0b",
            "--template holds a NUL character (U+0000), which SQL databases cannot store",
        ),
        (
            "a\udce9",
            "--template holds half of a surrogate pair (U+DCE9), which is no text",
        ),
    ],
)
def test_refused_template(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        compile_template(text, "--template")
    assert str(error.value) == message


def test_what_pythons_compiler_refuses() -> None:
    depth = 60
    text = "{% for i in x %}" * depth + "{% endfor %}" * depth
    with pytest.raises(UsageError) as error:
        compile_template(text, "--system")
    assert str(error.value).startswith("--system cannot be compiled: ")


def test_names() -> None:
    text = "{% set x = a %}{{ x }}{{ b.c }}{{ range(2) | list }}{{ row['d'] }}"
    assert compile_template(text, "x").names == {"a", "b", "row"}


def test_a_column_may_have_the_name_of_a_function_or_of_row() -> None:
    assert render("{{ range }}{{ row }}", {"range": "a", "row": "b"}) == "ab"


@settings(deadline=None)
@given(st.text(max_size=30), st.dictionaries(st.text(max_size=5), st.text(max_size=5)))
def test_any_template_renders_or_is_refused(text: str, columns: dict[str, str]) -> None:
    try:
        out = render("{{ a }}" + text, columns)
    except (UsageError, BadRowError) as error:
        out = str(error)
        if not out.isprintable():
            pytest.fail(f"the message {out!r} is not one line")
    assert unstorable(out) is None


@given(st.text())
def test_one_line(text: str) -> None:
    assert one_line(text).isprintable()
    assert len(one_line(text, 10)) <= 10


def test_the_bound_is_no_hindrance() -> None:
    text = "a" * (MAX_CHARS - 1)
    assert render("{{ a }}", {"a": text}) == text


SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "a"}


def builder(**options: Any) -> RowBuilder:
    made = make_builder(**options)
    assert made is not None
    return made


class TestRowBuilder:
    def test_nothing_asked(self) -> None:
        assert make_builder() is None

    def test_a_template(self) -> None:
        made = builder(template="{{ x }}")
        assert made.reads_columns
        assert made.from_columns({"x": "a"}) == {"prompt": "a"}

    def test_a_template_as_a_chat(self) -> None:
        assert builder(template="{{ x }}", chat=True).from_columns({"x": "a"}) == {
            "messages": [USER]
        }

    def test_a_template_with_a_system_message(self) -> None:
        made = builder(template="{{ x }}", system="Be {{ how }}.")
        assert made.from_columns({"x": "a", "how": "brief"}) == {"messages": [SYSTEM, USER]}

    def test_a_system_message_alone(self) -> None:
        made = builder(system="Be brief.")
        assert not made.reads_columns
        assert made.from_request({"prompt": "a", "metadata": {"m": 1}}, {}) == {
            "messages": [SYSTEM, USER],
            "metadata": {"m": 1},
        }
        assert made.from_request({"messages": [USER]}, {}) == {"messages": [SYSTEM, USER]}

    def test_with_a_chat_the_prompt_beside_it_goes(self) -> None:
        body = {"prompt": "b", "messages": [USER]}
        assert builder(system="Be brief.").from_request(body, {}) == {"messages": [SYSTEM, USER]}

    @pytest.mark.parametrize("role", ["system", "developer"])
    def test_two_system_messages(self, role: str) -> None:
        body = {"messages": [{"role": role, "content": "x"}, USER]}
        with pytest.raises(BadRowError) as error:
            builder(system="Be brief.").from_request(body, {})
        assert str(error.value) == (
            "the row has a system message already; give it there or --system"
        )
        assert builder(chat=True).from_request(body, {}) == body

    @pytest.mark.parametrize(
        ("options", "option"), [({"chat": True}, "--chat"), ({"system": "x"}, "--system")]
    )
    def test_token_ids_are_no_chat(self, options: dict[str, Any], option: str) -> None:
        with pytest.raises(BadRowError) as error:
            builder(**options).from_request({"prompt": [1]}, {})
        assert str(error.value) == f"{option} needs a text prompt, this row's is token ids"

    def test_the_generate_task_takes_requests(self) -> None:
        made = builder(task="generate")
        assert not made.reads_columns
        assert made.from_request({"prompt": [1]}, {}) == {"prompt": [1]}
        assert builder(task="generate", template="<{{ x }}>").from_columns({"x": 1}) == {
            "prompt": "<1>"
        }

    def test_a_task_with_a_template(self) -> None:
        body = builder(task="summarize", template="{{ x }}!").from_columns({"x": "News"})
        assert body["messages"][-1]["content"].endswith("\n\nNews!")
        assert body["prompt"].endswith("\n\nText: News!\nSummary:")

    def test_a_task_with_a_system_message(self) -> None:
        body = builder(task="summarize", system="Be brief.").from_columns({"text": "News"})
        assert set(body) == {"messages"}
        assert body["messages"][0] == SYSTEM
        assert [message["role"] for message in body["messages"]] == ["system", "user"]

    def test_a_task_as_a_chat(self) -> None:
        body = builder(task="summarize", chat=True).from_columns({"text": "News"})
        assert set(body) == {"messages"}

    def test_job_params(self) -> None:
        made = builder(task="summarize")
        assert made.job_params({"temperature": 1.0}) == {
            "max_tokens": 256,
            "temperature": 1.0,
            "stop": ["\nText:"],
        }
        assert "max_tokens" not in made.job_params({"min_tokens": 300})
        assert builder(chat=True).job_params({"min_tokens": 3}) == {"min_tokens": 3}

    def test_describe(self) -> None:
        made = builder(
            template="{{ x }}", system="s", chat=True, task="classify", labels=("a", "b")
        )
        assert made.describe() == {
            "template": "{{ x }}",
            "system": "s",
            "chat": True,
            "task": {"name": "classify", "labels": ["a", "b"]},
        }
        assert builder(chat=True).describe() == {"chat": True}
