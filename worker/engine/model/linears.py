"""The matrices of a layer as the runners call them: those with the same input joined into one, or,
if they are quantised, one by one, as transformers' quantiser has made them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from worker.engine.model.weights import is_dense

Linear = Callable[[torch.Tensor], torch.Tensor]
"""[rows, in] to [rows, out]."""

MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], Linear]
"""From a plain matrix, [out, in], and its bias."""


@dataclass(frozen=True, slots=True)
class LayerLinears:
    """All matrices of a layer."""

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear


def layer_linears(model: Any, index: int, make: MakeLinear) -> LayerLinears:
    """Takes a layer's matrices out of a transformers model. Plain ones go to `make` and are emptied
    there; quantised ones stay in the model."""
    layer = model.model.layers[index]
    attention, mlp = layer.self_attn, layer.mlp
    return LayerLinears(
        qkv=joined([attention.q_proj, attention.k_proj, attention.v_proj], make),
        o=joined([attention.o_proj], make),
        gate_up=joined([mlp.gate_proj, mlp.up_proj], make),
        down=joined([mlp.down_proj], make),
    )


def output_linear(model: Any, make: MakeLinear) -> Linear:
    """The output layer, which may be the embedding and so stays in the model."""
    module = model.get_output_embeddings()
    return make(module.weight.data, _data(module.bias)) if is_dense(module) else _Modules([module])


def joined(modules: Sequence[Any], make: MakeLinear) -> Linear:
    """One linear for all of them, their outputs side by side."""
    if not all(map(is_dense, modules)):
        return _Modules(modules)
    weights = [module.weight.data for module in modules]
    biases = [_data(module.bias) for module in modules]
    for module in modules:
        # Frees their memory once the joined matrix is made and this function has returned.
        for parameter in module.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
    if len(modules) == 1:
        return make(weights[0], biases[0])
    return make(torch.cat(weights), _joined_biases(weights, biases))


def _joined_biases(
    weights: list[torch.Tensor], biases: list[torch.Tensor | None]
) -> torch.Tensor | None:
    """Zeros where one has none beside others that have."""
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [
            weight.new_zeros(len(weight)) if bias is None else bias
            for weight, bias in zip(weights, biases, strict=True)
        ]
    )


class _Modules:
    """Modules called as transformers calls them, on one batch of rows."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        # Some quantisers compute in a type of their own.
        outs = [module(rows[None])[0].to(rows.dtype) for module in self._modules]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def _data(bias: torch.nn.Parameter | None) -> torch.Tensor | None:
    return None if bias is None else bias.data
