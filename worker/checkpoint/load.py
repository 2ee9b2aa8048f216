"""From a checkpoint's key to a model that can generate, or one line about what is wrong."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from nightherd.errors import CheckpointError
from nightherd.text import TextProcessor
from nightherd.tokenizer import read_json
from worker.checkpoint import memory
from worker.checkpoint.device import (
    keeps_bfloat16,
    loads_straight,
    resolve_device,
    resolve_dtype,
)
from worker.checkpoint.files import Folder, read_weights
from worker.checkpoint.locate import find
from worker.checkpoint.quantization import loading_options, method_of, unwrap
from worker.checkpoint.report import check, check_architecture, check_packages
from worker.checkpoint.sentencepiece_tokenizer import convert_tokenizer
from worker.engine.cpu.compiler import CpuKernels

log = logging.getLogger("nightherd.checkpoint")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, ready to generate: in eval mode, on its device."""

    model: PreTrainedModel
    folder: Path
    device: torch.device

    @property
    def dtype(self) -> str:
        """`bfloat16`, `float16` or `float32`."""
        weight = self.model.get_input_embeddings().weight
        return str(cast(torch.Tensor, weight).dtype).removeprefix("torch.")

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding: token ids below it have one, the tokenizer's or padding."""
        weight = self.model.get_input_embeddings().weight
        return int(cast(torch.Tensor, weight).shape[0])


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint's text side and its model."""

    text: TextProcessor
    model: LoadedModel


def open_checkpoint(
    key: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    chat_template: str | None = None,
    home: Path,
    kernels: CpuKernels | None = None,
) -> Opened:
    """Checks, downloads and loads a checkpoint, as a worker does.

    What is known to be wrong is raised before anything large is fetched or loaded. `home` is
    the data folder, `kernels` those that will be used on a CPU. Raises `CheckpointError`.
    """
    report = check(
        key, device=device, dtype=dtype, home=home, chat_template=chat_template, kernels=kernels
    )
    if report.problems:
        raise CheckpointError(report.problems[0])
    if kernels is not None and report.device == "cpu":
        # Whether there are any decides about the number type.
        kernels.prepare()
    folder = report.path or find(key)
    text = report.text or load_text(folder, home, chat_template)
    return Opened(text, load_model(folder, device, dtype, kernels))


def load_text(folder: Path, home: Path, chat_template: str | None = None) -> TextProcessor:
    """The text side of a folder; a tokenizer.model alone is converted first."""
    convert_tokenizer(folder, home)
    return TextProcessor.load(folder, chat_template, home=home)


def load_model(
    folder: Path, device: str = "auto", dtype: str = "auto", kernels: CpuKernels | None = None
) -> LoadedModel:
    """Loads a checkpoint's weights with transformers: safetensors alone, no code of its own.

    Raises `CheckpointError` for a device that is not here, an architecture that transformers does
    not know, weights that are missing, broken or of another shape, and too little memory.
    """
    torch_device = resolve_device(device)
    config = read_json(folder, "config.json")
    check_architecture(config)
    check_packages(config, torch_device)
    weights = read_weights(Folder(folder))
    stored = keeps_bfloat16(weights, config)
    precision = resolve_dtype(dtype, torch_device, bfloat16=stored, kernels=kernels)
    need = memory.weights_bytes(weights, config, precision, torch_device)
    problem = memory.problem(str(folder), need, config, precision, torch_device)
    if problem is not None:
        raise CheckpointError(problem)
    try:
        with _quiet_transformers():
            model, info = _from_pretrained(folder, config, torch_device, precision)
        problem = _incomplete(info)
        if problem is None:
            _finish_loading(model, config, torch_device)
            return LoadedModel(model=model, folder=folder, device=torch_device)
    except (MemoryError, torch.OutOfMemoryError):
        problem = (
            f"it does not fit into the memory of {torch_device}; use a smaller or quantised one"
        )
    except Exception as error:  # transformers raises whatever its parts raise
        problem = one_line(error)
    raise CheckpointError(f"checkpoint {folder} cannot be loaded: {problem}")


def _from_pretrained(
    folder: Path, config: Mapping[str, Any], device: torch.device, precision: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model on its device, and what transformers says about its weights."""
    straight = loads_straight(device)
    if not straight:
        log.warning(
            "the weights go to %s by way of the machine's memory: slower, and it must hold all of "
            "them; pip install accelerate",
            device,
        )
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=precision,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        # Only so that the names can be told: `_incomplete` refuses such a model.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **({"device_map": {"": device}} if straight and device.type != "cpu" else {}),
        **loading_options(config, device),
    )
    model, info = cast(tuple[Any, dict[str, Any]], loaded)
    if not straight:
        model.to(device)
    return model, info


@torch.no_grad()
def _finish_loading(model: Any, config: Mapping[str, Any], device: torch.device) -> None:
    """Makes a model ready to generate, and frees what only loading needed."""
    model.eval()
    method = method_of(config)
    if method is not None:
        # Some quantisers unpack weights in the first pass through the whole model, which no engine
        # makes; and kernels that do not run here say so now.
        model(torch.zeros(1, 2, dtype=torch.int64, device=device), use_cache=False)
    if method == "compressed-tensors":
        unwrap(model)
    if device.type == "cuda":
        # transformers takes the memory of all weights at once, and more for some quantised ones.
        torch.cuda.empty_cache()


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an error says, on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bar where nobody watches, and its table of missing keys."""
    bar = transformers_logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    if bar:
        _disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # It warns whoever says how a quantised checkpoint is to be loaded.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            _enable_progress_bar()


# transformers leaves these two untyped.
_disable_progress_bar = cast("Callable[[], None]", transformers_logging.disable_progress_bar)
_enable_progress_bar = cast("Callable[[], None]", transformers_logging.enable_progress_bar)


def _incomplete(info: dict[str, Any]) -> str | None:
    """What is wrong with the weights; transformers itself would fill gaps with random numbers."""
    for kind, text in (
        ("missing_keys", "its weights lack {}; download or copy it again"),
        ("mismatched_keys", "its weights have {} in another shape than config.json says"),
    ):
        # A mismatched key comes with its two shapes.
        keys = info.get(kind) or ()
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in keys)
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return text.format(names[0] + more)
    return None
