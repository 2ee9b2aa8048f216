"""The tasks: both forms of each, their columns, arguments and defaults."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from nightherd.errors import ParameterError, UsageError
from nightherd.params import effective_params, parse_body, parse_params
from nightherd.structured import (
    Structure,
    check_structure,
    structure_of,
    without_leading_space,
)
from producer.prompts.template import BadRowError
from producer.tasks.base import BoundTask
from producer.tasks.registry import (
    TASKS,
    get_task,
    make_builder,
    parse_labels,
    parse_schema,
    parse_task_args,
)

SCHEMA = {"type": "object", "properties": {"zeta": {"type": "integer"}, "ä": {}}}

NEEDS: dict[str, dict[str, Any]] = {
    "translate": {"args": {"target_language": "Dutch"}},
    "classify": {"labels": ("good", "bad")},
    "extract": {"schema": SCHEMA},
}
REAL = [name for name in TASKS if name != "generate"]


def bound(name: str) -> BoundTask:
    return get_task(name).bind(**NEEDS.get(name, {}))


def test_the_names() -> None:
    assert list(TASKS) == ["generate", "summarize", "translate", "answer", "classify", "extract"]
    assert all(task.name == name and task.help.endswith(".") for name, task in TASKS.items())


@pytest.mark.parametrize("name", REAL)
class TestEvery:
    def test_both_forms(self, name: str) -> None:
        body = bound(name).build({"text": "The row's {{ text }}."})
        assert parse_body(body) == body
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        assert "The row's {{ text }}." in body["messages"][1]["content"]
        assert body["prompt"].count("The row's {{ text }}.") == 1

    def test_the_base_form_ends_where_the_answer_begins(self, name: str) -> None:
        prompt = bound(name).build({"text": "T"})["prompt"]
        # A space at the end would split the token that the answer begins with.
        assert prompt.endswith(":")
        assert prompt.startswith("Each ")

    def test_a_stop_string_ends_the_base_form_and_no_prompt_ends_with_it(self, name: str) -> None:
        task = bound(name)
        prompt = task.build({"text": "T"})["prompt"]
        head, _, _ = prompt.rpartition("\n\n")
        assert any(stop in prompt.removeprefix(head)[1:] for stop in task.params["stop"])
        assert not any(prompt.endswith(stop) for stop in task.params["stop"])
        # An answer of several paragraphs passes.
        assert all(stop.strip() for stop in task.params["stop"])

    def test_the_defaults_are_parameters(self, name: str) -> None:
        params = bound(name).params
        assert parse_params(params) == params
        assert effective_params({"temperature": 0.5}, params).temperature == 0.5

    def test_the_first_input_counts(self, name: str) -> None:
        first, second = TASKS[name].inputs[:2]
        assert bound(name).text_of({second: "b", first: "a"}) == "a"
        assert bound(name).text_of({second: "b", first: None}) == "b"

    def test_plain_text_will_do(self, name: str) -> None:
        assert "text" in TASKS[name].inputs
        assert "prompt" in TASKS[name].inputs

    def test_no_input(self, name: str) -> None:
        with pytest.raises(BadRowError) as error:
            bound(name).build({"a": "b"})
        assert str(error.value) == (
            f"--task {name} needs one of the columns {', '.join(TASKS[name].inputs)} "
            "(columns: a); or a --template that makes its text"
        )


@pytest.mark.parametrize(
    ("value", "kind"),
    [(["a"], "an array"), ({}, "an object"), (True, "a truth value")],
)
def test_an_input_that_is_no_text(value: object, kind: str) -> None:
    with pytest.raises(BadRowError) as error:
        bound("summarize").build({"text": value})
    assert str(error.value) == f"column 'text' must be text, it is {kind}"


def test_a_number_is_text() -> None:
    assert bound("answer").text_of({"question": 7}) == "7"


def test_generate_is_the_identity() -> None:
    task = bound("generate")
    assert task.is_identity
    assert task.params == {}
    assert task.build({"prompt": "a"}) == {"prompt": "a"}


def test_translate_names_its_languages() -> None:
    task = get_task("translate").bind({"target_language": "Dutch", "source_language": "Polish"})
    body = task.build({"text": "Cześć"})
    assert "from Polish into Dutch" in body["messages"][1]["content"]
    assert body["prompt"].startswith("Each text")
    assert body["prompt"].endswith("\n\nText (Polish): Cześć\nDutch:")
    assert bound("translate").build({"text": "Cześć"})["prompt"].endswith("\n\nText: Cześć\nDutch:")


def test_answer_uses_a_context_where_there_is_one() -> None:
    task = bound("answer")
    with_context = task.build({"question": "Q?", "context": "C."})
    assert with_context["prompt"].endswith("\n\nContext: C.\nQuestion: Q?\nAnswer:")
    assert "Context: C." in with_context["messages"][1]["content"]
    for row in ({"question": "Q?"}, {"question": "Q?", "context": None}):
        without = task.build(row)
        assert "Context" not in without["prompt"]
        assert without["messages"][1]["content"] == "Q?"


def test_classify_puts_its_labels_in_and_leaves_them_room() -> None:
    task = get_task("classify").bind(labels=("good", "sehr schön"))
    body = task.build({"text": "T"})
    assert "good, sehr schön" in body["messages"][1]["content"]
    assert body["prompt"].endswith("\n\nText: T\nLabels: good, sehr schön\nLabel:")
    params = task.params
    assert params["temperature"] == 0.0
    # Enough even where every byte is a token: a space, the label, the stop string.
    assert params["max_tokens"] >= len(" sehr schön\n\nText:".encode())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"task": "sumarize"},
            (
                "no task 'sumarize'; did you mean summarize? "
                "(tasks: generate, summarize, translate, answer, classify, extract)"
            ),
        ),
        (
            {"task": "xyz"},
            "no task 'xyz' (tasks: generate, summarize, translate, answer, classify, extract)",
        ),
        (
            {"task": "translate"},
            "--task translate needs target_language: --task-arg target_language=French",
        ),
        (
            {"task": "translate", "task_args": {"target": "x"}},
            (
                "--task translate has no argument 'target' (it takes: target_language, "
                "source_language); e.g. --task-arg target_language=French"
            ),
        ),
        (
            {"task": "translate", "task_args": {"target_language": " "}},
            (
                "--task-arg target_language must be one line of text, got ' '; "
                "e.g. --task-arg target_language=French"
            ),
        ),
        (
            {"task": "translate", "task_args": {"target_language": "x\udce9"}},
            (
                "--task translate: 'x\\udce9' holds half of a surrogate pair (U+DCE9), "
                "which is no text"
            ),
        ),
        (
            {"task": "answer", "task_args": {"x": "y"}},
            "--task answer has no argument 'x' (it takes: none)",
        ),
        (
            {"task": "classify"},
            "--task classify needs two labels or more, got none: --labels positive,negative",
        ),
        (
            {"task": "classify", "labels": ("a",)},
            "--task classify needs two labels or more, got 'a' alone: --labels positive,negative",
        ),
        ({"task": "classify", "labels": ("a", "a")}, "label 'a' is given twice"),
        ({"task": "classify", "labels": ("a", "")}, "a label must be one line of text, got ''"),
        (
            {"task": "summarize", "labels": ("a", "b")},
            "--task summarize takes no labels; --labels is for classify",
        ),
        ({"labels": ("a", "b")}, "--labels has no --task to go to: add --task classify"),
        (
            {"task": "extract"},
            "--task extract needs a JSON schema: --schema FILE, or the schema itself",
        ),
        (
            {"task": "extract", "schema": {"type": "objekt"}},
            "--schema does not compile: Invalid type: objekt",
        ),
        (
            {"task": "classify", "labels": ("a", "b"), "schema": {}},
            "--task classify takes no schema; --schema is for extract",
        ),
        ({"schema": {}}, "--schema has no --task to go to: add --task extract"),
        ({"task_args": {"a": "b"}}, "--task-arg a has no --task to go to"),
    ],
)
def test_usage(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        make_builder(**options)
    assert str(error.value) == message


def test_classify_holds_the_output_to_its_labels() -> None:
    made = make_builder(task="classify", labels=("good", "sehr schön"))
    assert made is not None
    params = effective_params(made.job_params({}))
    assert structure_of(params) == Structure(
        "choice", '["good", "sehr schön"]', "structured_outputs.choice"
    )
    # The space that the few-shot form's label begins with is no part of the result.
    assert without_leading_space(params, " good") == "good"


def test_extract_puts_its_schema_in_and_holds_the_output_to_it() -> None:
    made = make_builder(task="extract", schema=SCHEMA)
    assert made is not None
    params = effective_params(made.job_params({}))
    assert params.structured_outputs == {"json": SCHEMA}
    assert params.max_tokens == 1024
    check_structure(params)
    body = made.from_columns({"text": "T", "instruction": "In metres."})
    written = json.dumps(SCHEMA, ensure_ascii=False)
    assert body["prompt"].endswith(
        f"\n\nText: T\nInstruction: In metres.\nSchema: {written}\nJSON:"
    )
    chat = body["messages"][1]["content"]
    assert "asks for. In metres.\n" in chat
    assert f"Schema: {written}\n" in chat
    body = made.from_columns({"text": "T"})
    assert body["prompt"].endswith(f"\n\nText: T\nSchema: {written}\nJSON:")
    assert "asks for.\n" in body["messages"][1]["content"]
    assert made.describe() == {"task": {"name": "extract", "schema": SCHEMA}}


def test_the_examples_of_extract_keep_to_their_schemas() -> None:
    few_shot = TASKS["extract"].few_shot or ""
    examples = re.findall(r"^Schema: (\{\".*)\nJSON: (.*)$", few_shot, re.MULTILINE)
    assert len(examples) == 2
    for schema, answer in examples:
        Draft202012Validator(json.loads(schema)).validate(json.loads(answer))


@pytest.mark.parametrize("name", ["classify", "extract"])
@pytest.mark.parametrize(
    ("given", "structured"),
    [
        ({}, True),
        ({"structured_outputs": {"regex": "a"}}, True),
        ({"response_format": {"type": "json_object"}}, True),
        ({"response_format": {"type": "text"}}, False),
    ],
)
def test_the_users_structure_goes_before_the_tasks(
    name: str, given: dict[str, Any], structured: bool
) -> None:
    made = make_builder(task=name, **NEEDS[name])
    assert made is not None
    params = made.job_params(given)
    assert ("structured_outputs" in params) == (not given or "structured_outputs" in given)
    assert {**params, **given} == params
    # A stop string counts only where nothing else ends the few-shot form.
    assert ("stop" in params) != structured
    check_structure(effective_params(params))


def test_a_stop_string_of_the_user_is_not_dropped_in_silence() -> None:
    made = make_builder(task="classify", labels=("a", "b"))
    assert made is not None
    with pytest.raises(ParameterError, match="stop would end the output"):
        check_structure(effective_params(made.job_params({"stop": ["x"]})))


def test_a_schema_is_a_file_or_itself(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA, indent=2))
    for given in (str(path), json.dumps(SCHEMA), f"\n {json.dumps(SCHEMA)}"):
        schema = parse_schema(given)
        assert schema == SCHEMA
        assert list(schema["properties"]) == ["zeta", "ä"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff", "cannot be read: it is no text in UTF-8"),
        (b"{", "is not JSON: Expecting property name"),
        (b"[1]", "is not a JSON schema: not an object"),
        (b"", "is not JSON: Expecting value"),
    ],
)
def test_a_bad_schema_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "schema.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        parse_schema(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_schema_on_the_command_line() -> None:
    with pytest.raises(UsageError, match=r"^--schema {'a': 1} is not JSON: Expecting property"):
        parse_schema("{'a': 1}")


def test_task_args() -> None:
    assert parse_task_args(["a=b=c", " d =", "a=b=c"]) == {"a": "b=c", "d": ""}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["x"], "--task-arg 'x' is not KEY=VALUE; e.g. --task-arg target_language=French"),
        (["=x"], "--task-arg '=x' is not KEY=VALUE; e.g. --task-arg target_language=French"),
        (["a=b", "a=c"], "--task-arg a is given twice: 'b' and 'c'"),
    ],
)
def test_bad_task_args(items: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_task_args(items)
    assert str(error.value) == message


def test_labels() -> None:
    assert parse_labels(" a, b b ,c") == ("a", "b b", "c")
    assert parse_labels(" ") == ()
    assert parse_labels("a,,b") == ("a", "", "b")
