"""Request bodies from rows, as `--template`, `--system`, `--chat` and `--task` say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from producer.prompts.template import BadRowError, Template

_STRUCTURE = ("response_format", "structured_outputs")


class BodyMaker(Protocol):
    """What a builder needs of a task that is bound to its arguments: see `tasks.base.BoundTask`."""

    @property
    def is_identity(self) -> bool: ...
    @property
    def params(self) -> Mapping[str, Any]: ...
    def describe(self) -> dict[str, Any]: ...
    def build(self, columns: Mapping[str, Any], text: str | None) -> dict[str, Any]: ...


def _structured(params: Mapping[str, Any]) -> bool:
    response_format = params.get("response_format") or {"type": "text"}
    return "structured_outputs" in params or response_format.get("type") != "text"


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@dataclass(frozen=True, slots=True)
class RowBuilder:
    """Makes request bodies as `--template`, `--system`, `--chat` and `--task` say.

    With a template or a task a row's keys are columns. Without one a row is a request of its own,
    to which only the system message is added, so that its parameters keep their meaning.
    """

    template: Template | None = None
    system: Template | None = None
    chat: bool = False
    task: BodyMaker | None = None

    @property
    def reads_columns(self) -> bool:
        """Whether a row's keys are columns, not the keys of a request."""
        return self.template is not None or (self.task is not None and not self.task.is_identity)

    @property
    def names(self) -> frozenset[str]:
        """The columns that a request may have because the system message uses them."""
        return self.system.names if self.system is not None else frozenset()

    @property
    def default_params(self) -> dict[str, Any]:
        """The task's parameters, a layer below the job's own."""
        return dict(self.task.params) if self.task is not None else {}

    def job_params(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The job's parameters: those given, then the task's where they do not contradict."""
        defaults = self.default_params
        if any(name in given for name in _STRUCTURE):
            defaults.pop("structured_outputs", None)
        params = {**defaults, **given}
        if "stop" not in given and _structured(params):
            # Such an output ends by itself, and a stop string beside it would be an error.
            params.pop("stop", None)
        if "max_tokens" not in given and params.get("min_tokens", 0) > params.get("max_tokens", 0):
            params.pop("max_tokens", None)
        return params

    def describe(self) -> dict[str, Any]:
        """What is stored with the job: the texts and names that made its bodies, as JSON."""
        described: dict[str, Any] = {}
        if self.template is not None:
            described["template"] = self.template.text
        if self.system is not None:
            described["system"] = self.system.text
        if self.chat:
            described["chat"] = True
        if self.task is not None:
            described["task"] = self.task.describe()
        return described

    def from_columns(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The body for a row of columns; raises `BadRowError`."""
        text = self.template.render(columns) if self.template is not None else None
        body = {"prompt": text} if self.task is None else self.task.build(columns, text)
        return self.from_request(body, columns)

    def from_request(self, body: dict[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
        """`body` with the system message and as a chat, where asked; raises `BadRowError`."""
        if self.system is None and not self.chat:
            return body
        messages = body.get("messages")
        if messages is None:
            prompt = body.get("prompt")
            if not isinstance(prompt, str):
                option = "--chat" if self.system is None else "--system"
                raise BadRowError(f"{option} needs a text prompt, this row's is token ids")
            messages = [_message("user", prompt)]
        elif self.task is not None and self.system is not None:
            messages = [message for message in messages if message["role"] != "system"]
        if self.system is not None:
            if any(message["role"] in ("system", "developer") for message in messages):
                raise BadRowError("the row has a system message already; give it there or --system")
            messages = [_message("system", self.system.render(columns)), *messages]
        # No prompt beside it: a base checkpoint would answer that one, without the system message.
        made = {**body, "messages": messages}
        made.pop("prompt", None)
        return made
