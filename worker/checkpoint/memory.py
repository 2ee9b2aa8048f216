"""How much memory a checkpoint needs, and how much a device has. Estimates: nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nightherd.machine import memory as machine_memory
from nightherd.machine import size as in_words
from worker.checkpoint.files import Weights
from worker.checkpoint.quantization import is_unpacked, method_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Need:
    """What a checkpoint takes on a device, in bytes, beside what is available there."""

    weights: int
    per_token: int | None
    """Of the KV cache, for one token of one sequence; None where config.json does not tell."""
    context: int
    sequences: int
    available: int

    @property
    def cache(self) -> int:
        """For so many sequences as long as the context."""
        return (self.per_token or 0) * self.context * self.sequences

    @property
    def total(self) -> int:
        return self.weights + self.cache

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    @property
    def tokens_that_fit(self) -> int | None:
        """Tokens of all sequences together that fit beside the weights; None if not known."""
        if not self.per_token:
            return None
        return max(0, self.available - self.weights) // self.per_token

    def as_json(self) -> dict[str, Any]:
        return {
            "weights_bytes": self.weights,
            "kv_bytes_per_token": self.per_token,
            "sequences": self.sequences,
            "kv_bytes": self.cache,
            "total_bytes": self.total,
            "available_bytes": self.available,
            "tokens_that_fit": self.tokens_that_fit,
            "fits": self.fits,
        }


def available(device: torch.device) -> int:
    """Free bytes of a device; of the CPU what the machine and its control groups leave."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return machine_memory()[0]


def kv_bytes_per_token(config: Mapping[str, Any], width: int) -> int | None:
    """2 (keys and values) × layers × KV heads × head size × bytes a number; None if unknown."""
    text = config.get("text_config") or config
    try:
        layers, heads = int(text["num_hidden_layers"]), int(text["num_attention_heads"])
        kv_heads = int(text.get("num_key_value_heads") or heads)
        size = int(text.get("head_dim") or int(text["hidden_size"]) // heads)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return 2 * layers * kv_heads * size * width


def weights_bytes(
    weights: Weights, config: Mapping[str, Any], precision: torch.dtype, device: torch.device
) -> int:
    """What weights take once they are loaded; quantised ones mostly stay as they are stored."""
    unpacked = is_unpacked(config, device)
    if method_of(config) is not None and not unpacked:
        return weights.stored_bytes()
    return weights.bytes_as(precision.itemsize, unpacked=unpacked)


def problem(
    label: str, need: int, config: Mapping[str, Any], precision: torch.dtype, device: torch.device
) -> str | None:
    """The line for weights that are larger than the memory; None if they are not."""
    form = "as quantised"
    if method_of(config) is None:
        form = "in " + str(precision).removeprefix("torch.")
    remedy = "use a smaller or quantised one, a smaller --dtype, or another --device or machine"
    free = available(device)
    if need > free:
        return (
            f"checkpoint {label} does not fit: its weights take {in_words(need)} {form}, "
            f"{in_words(free)} of memory are available on {device}; {remedy}"
        )
    from worker.checkpoint.device import loads_straight

    if loads_straight(device):
        return None
    free = machine_memory()[0]
    if need > free:
        return (
            f"checkpoint {label} cannot be loaded: its weights take {in_words(need)} {form} of the "
            f"machine's own memory on their way to {device}, {in_words(free)} are available; pip "
            f"install accelerate, which spares that, or {remedy}"
        )
    return None
