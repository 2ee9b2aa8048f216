"""What all drivers share: the task, the clock, the result. Nothing but the standard library.

A driver runs in the peer's own environment: `python drive_NAME.py TASK.json`. It loads, warms up,
answers all requests as fast as it can, and writes the task's `result` file.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

Lengths = Sequence[int]
"""Tokens generated, request by request."""


class Task:
    """What a driver is asked to do."""

    def __init__(self, path: Path) -> None:
        fields = json.loads(path.read_text())
        self.checkpoint = Path(fields["checkpoint"])
        self.random: str | None = fields.get("random")
        """The shape whose weights are made here at random, not read."""
        self.profile: int = fields.get("profile", 0)
        """Requests that are answered once more, watched, after all is measured."""
        self.dtype: str = fields["dtype"]
        """`bfloat16` or `float32`."""
        self.device: str = fields["device"]
        self.threads: int = fields["threads"]
        self.context: int = fields["context"]
        self.kv_bytes: int = fields["kv_bytes"]
        self.kv_bytes_per_token: int = fields["kv_bytes_per_token"]
        self.temperature: float = fields["temperature"]
        self.top_p: float = fields["top_p"]
        self.top_k: int = fields["top_k"]
        self.schema: dict[str, Any] | None = fields["schema"]
        self.requests: list[dict[str, Any]] = fields["requests"]
        self.warm_up: list[dict[str, Any]] = fields["warm_up"]
        self.options: dict[str, Any] = fields["options"]
        self.cache = Path(fields["cache"])
        self.result = Path(fields["result"])
        self.started = time.monotonic()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def option(self, name: str, default: Any) -> Any:
        """An option of the engine (`--set ENGINE.NAME=VALUE`)."""
        return self.options.pop(name, default)

    def measure(
        self,
        generate: Callable[[list[dict[str, Any]]], Lengths],
        settings: dict[str, Any],
        more: Callable[[], dict[str, Any]] = dict,
        seconds: Callable[[], float] | None = None,
    ) -> None:
        """Warms up, measures and writes the result; every length must be what was asked for.

        `seconds` tells how long the last `generate` took, where the wall clock around it is not it.
        """
        if self.options:
            raise SystemExit(f"unknown options: {', '.join(self.options)}")
        loaded = time.monotonic()
        generate(self.warm_up)
        started = time.monotonic()
        lengths = generate(self.requests)
        took = time.monotonic() - started if seconds is None else seconds()
        for place, (request, length) in enumerate(zip(self.requests, lengths, strict=True)):
            if length != request["out"]:
                raise SystemExit(f"request {place}: {length} tokens instead of {request['out']}")
        result: dict[str, Any] = {
            "tokens": sum(lengths),
            "seconds": took,
            "tokens_per_second": sum(lengths) / took,
            "load_seconds": loaded - self.started,
            "warm_up_seconds": started - loaded,
            "peak_bytes": _peak(),
            "settings": settings,
            **more(),
        }
        if self.profile:
            from card import profiled

            with profiled() as made:
                generate(self.requests[: self.profile])
            result["profile"] = made
        self.result.write_text(json.dumps(result))


def transformers_model(given: Task, **more: Any) -> Any:
    """The model as transformers has it, on its device; `more` is for `from_pretrained`."""
    import torch

    if given.random is not None:
        from shapes import random_model

        attention = more.pop("attn_implementation", None)
        model = random_model(given.random, given.dtype, given.device, given.context)
        if attention is not None:
            model.set_attn_implementation(attention)
        return model
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, given.dtype)
    model = AutoModelForCausalLM.from_pretrained(given.checkpoint, dtype=dtype, **more)
    return model.to(given.device).eval()


def task() -> Task:
    """The task that the command line names."""
    return Task(Path(sys.argv[1]))


def _peak() -> int:
    """The peaks of resident memory of this process and of all below it, added up."""
    from tether import below

    total = 0
    for process in (os.getpid(), *below(os.getpid())):
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:  # it has just ended
            continue
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) * 1024
    return total


def torch_facts(device: str) -> dict[str, Any]:
    """The peak of the card's memory, where there is a card."""
    if not device.startswith("cuda"):
        return {}
    import torch

    return {"peak_device_bytes": int(torch.cuda.max_memory_reserved())}
