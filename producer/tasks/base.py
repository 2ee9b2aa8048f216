"""What a task is: a declaration of its columns, its two forms and its defaults.

A task writes every request in two forms: a chat (`messages`), used where the checkpoint has a chat
template, and a few-shot text (`prompt`) that a base checkpoint continues well. Which one is used
is decided by the worker, which knows the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nightherd.errors import ParameterError, UsageError
from nightherd.params import SamplingParams
from nightherd.structured import check_structure
from producer.prompts.template import (
    BadRowError,
    Template,
    compile_template,
    describe_columns,
    unstorable,
)


@dataclass(frozen=True, slots=True)
class Argument:
    """One `--task-arg` of a task."""

    name: str
    help: str
    example: str
    required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task that `--task` names.

    The templates see the row's text under the first name of `inputs`, the columns of `optional`
    (null where a row has none), the arguments (null likewise), `labels`, and `schema` as JSON.
    """

    name: str
    help: str
    inputs: tuple[str, ...]
    """Accepted names of the column that is worked on; of several in a row the first counts."""
    optional: tuple[str, ...] = ()
    arguments: tuple[Argument, ...] = ()
    takes_labels: bool = False
    takes_schema: bool = False
    system: str | None = None
    user: str | None = None
    """The chat form's user message; None is the identity: the text is the prompt, as it is."""
    few_shot: str | None = None
    """The base form: examples and the row's text, ending where the answer begins."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Defaults below the job's parameters; they hold for both forms.

    With labels or a schema the output is held to them, and `stop` counts only where the user has
    taken that off. A stop string here must be one that no sensible chat answer contains: a blank
    line would end the base form's answer neatly, and cut every chat answer of two paragraphs in
    half. The label that begins the next example is safe in both.
    """

    def bind(
        self,
        args: Mapping[str, str] | None = None,
        labels: Sequence[str] = (),
        schema: Mapping[str, Any] | None = None,
    ) -> BoundTask:
        """The task with its arguments; raises `UsageError` naming what is unknown or missing."""
        args = dict(args or {})
        self._check_args(args)
        self._check_labels(labels)
        self._check_schema(schema)
        for value in (*args.values(), *labels):
            reason = unstorable(value)
            if reason:
                raise UsageError(f"--task {self.name}: {value!r} holds {reason}")

        def compiled(text: str | None, form: str) -> Template | None:
            return None if text is None else compile_template(text, f"--task {self.name} ({form})")

        return BoundTask(
            task=self,
            args=args,
            labels=tuple(labels),
            schema=None if schema is None else dict(schema),
            system=compiled(self.system, "system"),
            user=compiled(self.user, "chat"),
            few_shot=compiled(self.few_shot, "few-shot"),
        )

    def _check_args(self, args: Mapping[str, str]) -> None:
        known = {argument.name: argument for argument in self.arguments}
        for name in args:
            if name not in known:
                takes = ", ".join(known) if known else "none"
                example = "".join(f"; e.g. --task-arg {a.example}" for a in self.arguments[:1])
                raise UsageError(
                    f"--task {self.name} has no argument {name!r} (it takes: {takes}){example}"
                )
        for argument in self.arguments:
            value = args.get(argument.name)
            if value is None and argument.required:
                raise UsageError(
                    f"--task {self.name} needs {argument.name}: --task-arg {argument.example}"
                )
            if value is not None and (not value.strip() or "\n" in value):
                raise UsageError(
                    f"--task-arg {argument.name} must be one line of text, got {value!r}; "
                    f"e.g. --task-arg {argument.example}"
                )

    def _check_labels(self, labels: Sequence[str]) -> None:
        if not self.takes_labels:
            if labels:
                raise UsageError(f"--task {self.name} takes no labels; --labels is for classify")
            return
        if len(labels) < 2:
            got = f"got {', '.join(labels)!r} alone" if labels else "got none"
            raise UsageError(
                f"--task {self.name} needs two labels or more, {got}: --labels positive,negative"
            )
        for index, label in enumerate(labels):
            if not label.strip() or "\n" in label:
                raise UsageError(f"a label must be one line of text, got {label!r}")
            if label in labels[:index]:
                raise UsageError(f"label {label!r} is given twice")

    def _check_schema(self, schema: Mapping[str, Any] | None) -> None:
        if schema is None:
            if self.takes_schema:
                raise UsageError(
                    f"--task {self.name} needs a JSON schema: --schema FILE, or the schema itself"
                )
            return
        if not self.takes_schema:
            raise UsageError(f"--task {self.name} takes no schema; --schema is for extract")
        try:
            check_structure(SamplingParams(structured_outputs={"json": dict(schema)}))
        except ParameterError as error:
            reason = str(error).removeprefix("structured_outputs.json ")
            raise UsageError(f"--schema {reason}") from None


@dataclass(frozen=True, slots=True)
class BoundTask:
    """A task with its arguments checked and its templates compiled."""

    task: Task
    args: dict[str, str]
    labels: tuple[str, ...]
    schema: dict[str, Any] | None
    system: Template | None
    user: Template | None
    few_shot: Template | None

    @property
    def is_identity(self) -> bool:
        """Whether a row's prompt stays as it is."""
        return self.user is None

    @property
    def params(self) -> dict[str, Any]:
        """The defaults, by canonical names."""
        params = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self.task.params.items()
        }
        if self.schema is not None:
            params["structured_outputs"] = {"json": self.schema}
        if self.labels:
            params["structured_outputs"] = {"choice": list(self.labels)}
            # No tokenizer makes more tokens of a text than it has bytes. The rest leaves room
            # for a space before the label and for the stop string behind it.
            stop = max((len(text) for text in params.get("stop", ())), default=0)
            params["max_tokens"] = max(len(label.encode()) for label in self.labels) + stop + 2
        return params

    def describe(self) -> dict[str, Any]:
        """Name, arguments, labels and schema as JSON values."""
        described: dict[str, Any] = {"name": self.task.name}
        if self.args:
            described["args"] = self.args
        if self.labels:
            described["labels"] = list(self.labels)
        if self.schema is not None:
            described["schema"] = self.schema
        return described

    def text_of(self, columns: Mapping[str, Any]) -> str:
        """The text that is worked on; raises `BadRowError` where the row has none."""
        for name in self.task.inputs:
            if columns.get(name) is not None:
                return _as_text(name, columns[name])
        raise BadRowError(
            f"--task {self.task.name} needs one of the columns {', '.join(self.task.inputs)} "
            f"{describe_columns(columns)}; or a --template that makes its text"
        )

    def build(self, columns: Mapping[str, Any], text: str | None = None) -> dict[str, Any]:
        """The body for one row: a chat and a few-shot prompt; raises `BadRowError`.

        `text` is what a `--template` made of the row, in place of the input column.
        """
        if text is None:
            text = self.text_of(columns)
        if self.user is None or self.few_shot is None:
            return {"prompt": text}
        values: dict[str, Any] = {
            name: None if columns.get(name) is None else _as_text(name, columns[name])
            for name in self.task.optional
        }
        for argument in self.task.arguments:
            values[argument.name] = self.args.get(argument.name)
        values["labels"] = self.labels
        values["schema"] = json.dumps(self.schema, ensure_ascii=False)
        values[self.task.inputs[0]] = text
        messages = [{"role": "user", "content": self.user.render(values)}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system.render(values)})
        return {"prompt": self.few_shot.render(values), "messages": messages}


def _as_text(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    kind = {dict: "an object", list: "an array", bool: "a truth value"}.get(type(value), "null")
    raise BadRowError(f"column {name!r} must be text, it is {kind}")
