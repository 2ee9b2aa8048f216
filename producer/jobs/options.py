"""From a submission's options, as a user gave them, to what `submit` needs of them.

The commands take them from their command line, a schedule from its row, at each firing anew.
"""

from __future__ import annotations

import getpass
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nightherd.catalogue import checkpoint_key, local_folder
from nightherd.errors import CheckpointError, ParameterError, UsageError
from nightherd.params import parse_params
from producer.inputs.reader import ReadOptions
from producer.prompts.builder import RowBuilder
from producer.tasks.registry import make_builder, parse_labels, parse_schema, parse_task_args

PARAMETER_OPTIONS = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "n", "logprobs"),
)
"""Parameters that are options of their own."""


@dataclass(frozen=True, slots=True)
class PreparedSubmission:
    """Checked options: what a job is stored with, and how its rows are read."""

    checkpoint_key: str
    params: dict[str, Any]
    builder: RowBuilder | None
    reading: ReadOptions

    @property
    def template(self) -> dict[str, Any] | None:
        """How rows became requests, to be stored with the job."""
        return None if self.builder is None else self.builder.describe()


def prepare(
    options: Mapping[str, Any], variables: Mapping[str, Any] | None = None
) -> PreparedSubmission:
    """Checks all options that need no rows; raises the `NightherdError` that names a wrong one.

    `variables`: names that templates know beside the columns.
    """
    key = checkpoint_key(options["checkpoint"])
    _refuse_empty_folder(key)
    params = job_params(options)
    builder = make_builder(
        template=options["template"],
        system=options["system"],
        chat=options["chat"],
        task=options["task"],
        task_args=parse_task_args(options["task_args"]),
        labels=parse_labels(options["labels"] or ""),
        schema=None if options["schema"] is None else parse_schema(options["schema"]),
        variables=variables,
    )
    if builder is not None:
        params = builder.job_params(params)
    reading = ReadOptions(
        format=options["input_format"],
        keep=frozenset(options["keep"]),
        ignore_unknown=options["ignore_unknown"],
        builder=builder,
    )
    return PreparedSubmission(key, params, builder, reading)


def job_params(options: Mapping[str, Any]) -> dict[str, Any]:
    """The job's layer of parameters; raises `ParameterError` naming what is wrong."""
    given: dict[str, Any] = {
        name: options[name] for name in PARAMETER_OPTIONS if options[name] is not None
    }
    if options["stop"]:
        given["stop"] = list(options["stop"])
    if options["stop_token_ids"]:
        given["stop_token_ids"] = list(options["stop_token_ids"])
    if options["ignore_eos"]:
        given["ignore_eos"] = True
    for item in options["params"]:
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--param {item}: write NAME=JSON, as --param top_k=40")
        if name in given:
            raise ParameterError(f"{name} is given twice; give it once")
        if name == "seed":
            raise UsageError("--param seed would give all rows one seed; use --seed")
        try:
            given[name] = json.loads(value)
        except ValueError:
            given[name] = value  # a bare word is a string
    return parse_params(given)


def user() -> str | None:
    """Who submits."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None  # a container's uid may have no name


def _refuse_empty_folder(key: str) -> None:
    """A folder that is here and holds no checkpoint would let the job wait for ever."""
    folder = local_folder(key)
    if folder is not None and folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no checkpoint: it has no config.json")
