"""Could a worker serve this checkpoint here? Answered without loading weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nightherd.catalogue import local_folder
from nightherd.errors import CheckpointError
from nightherd.machine import size as in_words
from nightherd.text import TextProcessor, context_length
from nightherd.tokenizer import read_json
from worker.checkpoint import memory
from worker.checkpoint.files import Folder, Weights, read_weights, weight_files
from worker.checkpoint.hub.repository import Repository
from worker.checkpoint.locate import locate
from worker.checkpoint.quantization import method_of, missing_packages
from worker.checkpoint.sentencepiece_tokenizer import check_converter, convert_tokenizer

if TYPE_CHECKING:
    import torch

    from worker.engine.cpu.compiler import CpuKernels

_TEMPLATE = "chat_template.jinja"


@dataclass(slots=True)
class CheckpointReport:
    """What is known of a checkpoint. None stands for what could not be seen."""

    checkpoint: str
    found: str | None = None
    """`folder`, `cache` or `hub`."""
    path: Path | None = None
    commit: str | None = None
    gated: str | None = None
    """Who grants access on the Hub: `auto` or `manual`."""
    size_bytes: int | None = None
    """Of its weights' files."""
    architecture: str | None = None
    model_type: str | None = None
    parameters: int | None = None
    stored_dtype: str | None = None
    context_length: int | None = None
    quantization: str | None = None
    missing_packages: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    """The file that it is read from."""
    vocab_size: int | None = None
    chat_template: bool | None = None
    device: str | None = None
    dtype: str | None = None
    memory: memory.Need | None = None
    problems: list[str] = field(default_factory=list)
    """Each keeps a worker from serving it, and says what to do."""
    notes: list[str] = field(default_factory=list)
    text: TextProcessor | None = None

    @property
    def ok(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        return {
            "checkpoint": self.checkpoint,
            "ok": self.ok,
            "found": self.found,
            "path": None if self.path is None else str(self.path),
            "commit": self.commit,
            "gated": self.gated,
            "size_bytes": self.size_bytes,
            "architecture": self.architecture,
            "model_type": self.model_type,
            "parameters": self.parameters,
            "stored_dtype": self.stored_dtype,
            "context_length": self.context_length,
            "quantization": self.quantization,
            "missing_packages": self.missing_packages,
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
            "chat_template": self.chat_template,
            "device": self.device,
            "dtype": self.dtype,
            "memory": None if self.memory is None else self.memory.as_json(),
            "problems": self.problems,
            "notes": self.notes,
        }


def check(
    key: str,
    *,
    home: Path,
    device: str = "auto",
    dtype: str = "auto",
    sequences: int | None = None,
    chat_template: str | None = None,
    kernels: CpuKernels | None = None,
) -> CheckpointReport:
    """Checks a checkpoint by its key; never raises `CheckpointError`, the report carries them.

    `home` is the data folder; `kernels` are those that a worker here would use on a CPU.
    `sequences` as long as the context must fit into the memory; by default only the weights must,
    and what does not fit of one sequence is a note.
    """
    report = CheckpointReport(key)
    try:
        files = locate(key)
        _describe_location(report, key, files)
        config = _config(report, files)
        weights = _weights(report, files)
        _describe_text(report, files, config, home, chat_template)
    except CheckpointError as error:
        report.problems.append(str(error))
        return report
    # Only now: torch and transformers take seconds to import.
    from worker.checkpoint.device import keeps_bfloat16, resolve_device, resolve_dtype

    torch_device, problem = None, None
    try:
        torch_device = resolve_device(device)
        stored = keeps_bfloat16(weights, config)
        precision = resolve_dtype(dtype, torch_device, bfloat16=stored, kernels=kernels)
    except CheckpointError as error:
        problem = str(error)
    if report.quantization is not None:
        report.missing_packages = missing_packages(report.quantization, torch_device)
    for check_config in (
        check_architecture,
        functools.partial(check_packages, device=torch_device),
    ):
        try:
            check_config(config)
        except CheckpointError as error:
            report.problems.append(str(error))
    if problem is not None or torch_device is None:
        report.problems.append(problem or "no device")
        return report
    report.device, report.dtype = str(torch_device), str(precision).removeprefix("torch.")
    _describe_memory(report, weights, config, torch_device, precision, sequences)
    return report


def _describe_location(report: CheckpointReport, key: str, files: Folder | Repository) -> None:
    if isinstance(files, Repository):
        report.found, report.commit, report.gated = "hub", files.commit, files.gated
        names = weight_files(files)
    else:
        hub = local_folder(key) is None
        report.found, report.path = "cache" if hub else "folder", files.path
        report.commit = files.path.name if hub else None
        names = weight_files(files)
    report.size_bytes = sum(files.sizes[name] for name in names)
    if isinstance(files, Repository) and files.parameters:
        # Also told of gated repositories to those who may not read them.
        report.parameters = sum(files.parameters.values())


def _config(report: CheckpointReport, files: Folder | Repository) -> dict[str, Any]:
    if isinstance(files, Repository):
        config = _parsed(files, "config.json")
    else:
        config = read_json(files.path, "config.json")
    names = config.get("architectures")
    report.architecture = str(names[0]) if isinstance(names, list) and names else None
    report.model_type = str(config.get("model_type"))
    report.quantization = method_of(config)
    report.context_length = context_length(config)
    return config


def _parsed(files: Repository, name: str) -> dict[str, Any]:
    try:
        value = json.loads(files.read(name))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint {files.label}: {name} is not a JSON object")
    return value


def check_architecture(config: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` for a type of model that this transformers cannot generate with."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    own = " (the code that it brings is never run)" if config.get("auto_map") else ""
    raise CheckpointError(
        f"transformers {transformers.__version__} has no causal language model of type "
        f"{kind!r}{own}; update it: pip install -U transformers, or use another checkpoint"
    )


def check_packages(config: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Raises `CheckpointError` for a quantisation whose package is not installed."""
    method = method_of(config)
    missing = [] if method is None else missing_packages(method, device)
    if missing:
        raise CheckpointError(
            f"the checkpoint is quantised by {method}, which needs: pip install {' '.join(missing)}"
        )


def _weights(report: CheckpointReport, files: Folder | Repository) -> Weights:
    if isinstance(files, Repository) and files.parameters:
        weights = Weights(dict(files.parameters))
    else:
        weights = read_weights(files)
    report.parameters = weights.count
    kinds = sorted(weights.parameters, key=lambda kind: weights.parameters[kind], reverse=True)
    report.stored_dtype = kinds[0] if kinds else None
    return weights


def _describe_text(
    report: CheckpointReport,
    files: Folder | Repository,
    config: Mapping[str, Any],
    home: Path,
    chat_template: str | None,
) -> None:
    report.tokenizer = next(
        (name for name in ("tokenizer.json", "tokenizer.model") if name in files.sizes), None
    )
    if report.tokenizer is None:
        raise CheckpointError(
            f"no tokenizer.json in {files.label}, nor a tokenizer.model; take them from the "
            "checkpoint that it was made from"
        )
    if isinstance(files, Repository):
        if report.tokenizer == "tokenizer.model":
            check_converter(files.label)
        settings = "tokenizer_config.json"
        report.chat_template = (
            chat_template is not None
            or _TEMPLATE in files.sizes
            or (settings in files.sizes and bool(_parsed(files, settings).get("chat_template")))
        )
        return
    convert_tokenizer(files.path, home)
    text = report.text = TextProcessor.load(files.path, chat_template, home=home)
    report.vocab_size, report.chat_template = text.vocab_size, text.has_chat_template
    if text.bos_token_id is not None and text.bos_token_id not in text.encode("a", True):
        report.notes.append(
            "plain prompts get no beginning-of-sequence token, as the tokenizer's files say; if "
            "the model was trained with one, set add_bos_token in tokenizer_config.json"
        )
    rows = config.get("vocab_size")
    if isinstance(rows, int) and text.vocab_size > rows:
        report.notes.append(
            f"the tokenizer knows {text.vocab_size:,} ids, the model {rows:,}: prompts with the "
            "others fail"
        )


def _describe_memory(
    report: CheckpointReport,
    weights: Weights,
    config: Mapping[str, Any],
    device: torch.device,
    precision: torch.dtype,
    sequences: int | None,
) -> None:
    need = report.memory = memory.Need(
        weights=memory.weights_bytes(weights, config, precision, device),
        per_token=memory.kv_bytes_per_token(config, precision.itemsize),
        context=report.context_length or 0,
        sequences=sequences or 1,
        available=memory.available(device),
    )
    problem = memory.problem(report.checkpoint, need.weights, config, precision, device)
    if problem is not None:
        report.problems.append(problem)
    elif not need.fits and sequences is not None:
        report.problems.append(
            f"{sequences:,} sequences of {need.context:,} tokens do not fit: with the weights they "
            f"take {in_words(need.total)}, {in_words(need.available)} are available on {device}; "
            "ask for fewer"
        )
    elif not need.fits:
        report.notes.append(
            f"not even one sequence as long as the context fits into the memory of {device}: "
            f"{need.tokens_that_fit or 0:,} tokens do, prompt and output of all sequences together"
        )
