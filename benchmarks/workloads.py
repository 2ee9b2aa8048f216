"""What the engines are asked: prompts as token ids, each with the number of tokens to generate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORKLOADS = ("W1", "W2", "gsm8k", "fixed", "samples")
_MOST = 1024
_FIXED = 512, 256
"""Prompt and output tokens of every request of `fixed` and `samples`."""
SAMPLES = 64
"""Requests of `samples` that have the same prompt."""
_IDS = 8000
"""All shapes have so many token ids."""
_PREFIX = 400
"""Tokens that all prompts of W2 begin with."""

Request = dict[str, Any]
"""`prompt`: token ids; `out`: tokens to generate."""


def workload(name: str, count: int, tokenizer: Path, data: Path | None) -> list[Request]:
    """The first `count` requests of a workload; `SystemExit` says what is wrong."""
    if name in ("fixed", "samples"):
        return _fixed(count, 1 if name == "fixed" else SAMPLES)
    if not 1 <= count <= _MOST:
        raise SystemExit(f"--requests must be from 1 to {_MOST}")
    ragged, shared = _random()
    if name == "W1":
        return ragged[:count]
    if name == "W2":
        return shared[:count]
    prompts = _gsm8k(tokenizer, data)
    if count > len(prompts):
        raise SystemExit(f"{data} has {len(prompts)} problems: give --requests {len(prompts)}")
    lengths = [request["out"] for request in ragged]
    return [
        {"prompt": prompt, "out": out}
        for prompt, out in zip(prompts[:count], lengths[:count], strict=True)
    ]


def warm_up(count: int = 8, prompt: int = 100, out: int = 8, more: int = 0) -> list[Request]:
    """A few requests that share nothing with any workload, so that no cache has them; outputs grow
    from `out` by up to `more`."""
    import numpy as np

    rng = np.random.default_rng(4321)
    return [
        {
            "prompt": [1, *rng.integers(3, _IDS, prompt - 1).tolist()],
            "out": out + index * more // count,
        }
        for index in range(count)
    ]


def as_text(requests: Sequence[Request], tokenizer: Path) -> list[Request]:
    """The same as texts, for who reads no token ids: `text`, and in `prompt` what it becomes."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    # A NUL, which no database takes, is one of the random tokens.
    texts = [made.decode(request["prompt"]).replace("\0", " ") for request in requests]
    return [
        {**request, "text": text, "prompt": made.encode(text).ids}
        for request, text in zip(requests, texts, strict=True)
    ]


def shared_tokens(name: str, requests: Sequence[Request]) -> int:
    """Prompt tokens that need not be computed, as another request has computed them."""
    if name == "samples":
        return (len(requests) - -(-len(requests) // SAMPLES)) * (_FIXED[0] - 1)
    return (len(requests) - 1) * _PREFIX if name == "W2" else 0


def _fixed(count: int, samples: int) -> list[Request]:
    """Random prompts of one length, each `samples` times in a row."""
    import numpy as np

    rng = np.random.default_rng(99)
    size, out = _FIXED
    prompts = rng.integers(3, _IDS, (-(-count // samples), size)).tolist()
    return [{"prompt": prompts[index // samples], "out": out} for index in range(count)]


def _random() -> tuple[list[Request], list[Request]]:
    """W1: ragged prompts and outputs; W2: a shared prefix. The order of draws is fixed."""
    import numpy as np

    rng = np.random.default_rng(1234)

    def lengths(mean: int, sigma: float, low: int, high: int) -> list[int]:
        drawn = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, _MOST)
        return [int(length) for length in np.clip(drawn.round(), low, high)]

    def tokens(size: int) -> list[int]:
        return [int(token) for token in rng.integers(3, _IDS, size)]

    prompts, outs = lengths(120, 0.8, 8, 512), lengths(100, 0.8, 4, 400)
    ragged = [
        {"prompt": [1, *tokens(size - 1)], "out": out}
        for size, out in zip(prompts, outs, strict=True)
    ]
    prefix = [1, *tokens(_PREFIX - 1)]
    outs = lengths(64, 0.5, 4, 256)
    shared = [{"prompt": prefix + tokens(30), "out": out} for out in outs]
    return ragged, shared


def _gsm8k(tokenizer: Path, data: Path | None) -> list[list[int]]:
    from tokenizers import Tokenizer

    if data is None or not data.is_file():
        raise SystemExit(
            f"no GSM8K at {data}: give a file of lines with a `question` each by --data"
        )
    encode = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode
    lines = data.read_text(encoding="utf-8").splitlines()
    return [[1, *encode(json.loads(line)["question"]).ids][:512] for line in lines if line.strip()]
