"""Checkpoints whose tokenizer is sentencepiece's tokenizer.model alone: converted once, kept.

transformers makes the tokenizer.json; the text side then needs neither it nor sentencepiece.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

from nightherd.errors import CheckpointError
from nightherd.tokenizer import converted_path

log = logging.getLogger("nightherd.checkpoint")

# sentencepiece's files are protocol buffers; transformers asks for both.
_PACKAGES = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}


def convert_tokenizer(folder: Path, home: Path) -> Path | None:
    """Converts the tokenizer.model of a folder, if that is all it has; the new file.

    `home` is the data folder. None where there is nothing to convert. Raises `CheckpointError`.
    """
    path = converted_path(folder, home)
    if path is None or path.exists():
        return path
    check_converter(str(folder))
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        made: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        content = made.backend_tokenizer.to_str()
    except Exception as error:  # whatever its parts raise
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{folder / 'tokenizer.model'} cannot be converted: {reason}; download or copy it again"
        ) from None
    finally:
        transformers_logging.set_verbosity(before)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        with new.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from None
    log.info("converted %s to %s", folder / "tokenizer.model", path)
    return path


def check_converter(label: str) -> None:
    """Raises `CheckpointError` where the packages that a conversion needs are not installed."""
    missing = [package for module, package in _PACKAGES.items() if not _installed(module)]
    if missing:
        raise CheckpointError(
            f"the tokenizer of {label} is sentencepiece's tokenizer.model; to convert it, once: "
            f"pip install {' '.join(missing)}"
        )


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
