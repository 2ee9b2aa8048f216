"""What the engine takes from a transformers model: shapes, weights, the table of rotary angles.

transformers loads every format and knows every kind of rotary scaling; the engine computes. What is
read here covers LLaMA in all its generations, and Mistral, Qwen2 and Qwen3, whose layers are the
same but for a few biases and norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
MAX_HEAD_DIM = 256
HEAD_STEP = 16
"""Of the kernels for CPUs: heads and the whole width are multiples of it."""


class UnsupportedModelError(Exception):
    """The engine does not cover this model; the message says why."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model, in numbers of elements."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab_rows: int
    """Rows of the embedding; the tokenizer's vocabulary may be smaller."""
    context: int
    norm_eps: float

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linear_weights(self) -> int:
        """Weights that each token is multiplied with, the output layer included."""
        attention = self.hidden * (2 * self.query_width + 2 * self.kv_width)
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.hidden * self.vocab_rows


@dataclass(slots=True)
class LayerWeights:
    """One layer's tensors as transformers has them: matrices are [out, in], biases may be None."""

    input_norm: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_bias: torch.Tensor | None
    k_bias: torch.Tensor | None
    v_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    """[head_dim], of each query head before the rotation (Qwen3)."""
    k_norm: torch.Tensor | None
    o: torch.Tensor
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class LayerNorms:
    """One layer's weights of RMSNorms."""

    input: torch.Tensor
    post: torch.Tensor
    q: torch.Tensor | None
    """[head_dim], of each query head before the rotation (Qwen3)."""
    k: torch.Tensor | None


def shape_of(model: Any) -> Shape:
    """The shape of a transformers model; raises `UnsupportedModelError` where it is not covered."""
    config = model.config
    if config.model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"its architecture is {config.model_type}, not one of {', '.join(MODEL_TYPES)}"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedModelError(f"its activation is {config.hidden_act}, not silu")
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if window is not None and window < context:
        raise UnsupportedModelError(
            f"its attention slides over {window} positions of a context of {context}"
        )
    table = model.get_input_embeddings()
    if not (isinstance(table, torch.nn.Embedding) and _is_plain(table)):
        raise UnsupportedModelError(f"its embedding is quantised, a {type(table).__name__}")
    heads = int(config.num_attention_heads)
    return Shape(
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        intermediate=int(config.intermediate_size),
        vocab_rows=int(model.get_input_embeddings().weight.shape[0]),
        context=context,
        norm_eps=float(config.rms_norm_eps),
    )


def covers(config: Mapping[str, Any]) -> bool:
    """Whether the engine, and its kernels for CPUs, cover a checkpoint, as far as config.json says.
    `shape_of` and the runner check the loaded model itself."""
    if config.get("model_type") not in MODEL_TYPES:
        return False
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        return False
    window, context = config.get("sliding_window"), config.get("max_position_embeddings", 0)
    if window is not None and config.get("use_sliding_window", True) and window < context:
        return False
    hidden, heads = int(config.get("hidden_size", 0)), int(config.get("num_attention_heads", 1))
    head_dim = int(config.get("head_dim") or hidden // heads)
    return head_dim % HEAD_STEP == 0 and head_dim <= MAX_HEAD_DIM and hidden % HEAD_STEP == 0


def check_dense(model: Any) -> None:
    """Raises `UnsupportedModelError` for a model with quantised matrices."""
    for name, module in model.named_modules():
        if (name.endswith("_proj") or name == "lm_head") and not is_dense(module):
            raise UnsupportedModelError(f"{name}, a {type(module).__name__}, is quantised")


_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def is_dense(module: Any) -> bool:
    """Whether a module is `rows @ weight.T + bias` with a plain matrix, and nothing else.

    Quantisers put in modules of their own, which may well be subclasses of `Linear`, or leave
    the module and put in a tensor of their own class, another `forward`, scales or hooks.
    """
    return type(module) is torch.nn.Linear and _is_plain(module)


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether a module has only a float matrix, perhaps a bias, and its class's own `forward`."""
    kept = vars(module)
    weight, forward = module.weight, kept.get("forward")
    return (
        (forward is None or getattr(forward, "__func__", None) is type(module).forward)
        and not any(kept.get(name) for name in _HOOKS)
        and not kept["_buffers"]
        and kept["_parameters"].keys() <= {"weight", "bias"}
        # A tensor of another class stays one as a parameter.
        and type(weight) is torch.nn.Parameter
        and weight.dtype in _FLOATS
        and weight.layout is torch.strided
    )


def layer_weights(model: Any, index: int) -> LayerWeights:
    """The tensors of one layer, not copied; for a model that `check_dense` lets pass."""
    layer = model.model.layers[index]
    attention, mlp, norms = layer.self_attn, layer.mlp, layer_norms(model, index)
    return LayerWeights(
        input_norm=norms.input,
        q=attention.q_proj.weight.data,
        k=attention.k_proj.weight.data,
        v=attention.v_proj.weight.data,
        q_bias=_data(attention.q_proj.bias),
        k_bias=_data(attention.k_proj.bias),
        v_bias=_data(attention.v_proj.bias),
        q_norm=norms.q,
        k_norm=norms.k,
        o=attention.o_proj.weight.data,
        o_bias=_data(attention.o_proj.bias),
        post_norm=norms.post,
        gate=mlp.gate_proj.weight.data,
        up=mlp.up_proj.weight.data,
        gate_bias=_data(mlp.gate_proj.bias),
        up_bias=_data(mlp.up_proj.bias),
        down=mlp.down_proj.weight.data,
        down_bias=_data(mlp.down_proj.bias),
    )


def layer_norms(model: Any, index: int) -> LayerNorms:
    """The norms of one layer, not copied."""
    layer = model.model.layers[index]
    q_norm, k_norm = (getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm"))
    return LayerNorms(
        input=layer.input_layernorm.weight.data,
        post=layer.post_attention_layernorm.weight.data,
        q=None if q_norm is None else q_norm.weight.data,
        k=None if k_norm is None else k_norm.weight.data,
    )


def drop_layer(model: Any, index: int) -> None:
    """Frees the memory of a layer whose weights have been copied."""
    for parameter in model.model.layers[index].parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


def embedding(model: Any) -> torch.Tensor:
    """[vocab_rows, hidden]; not copied."""
    weight: torch.Tensor = model.get_input_embeddings().weight.data
    return weight


def final_norm(model: Any) -> torch.Tensor:
    weight: torch.Tensor = model.model.norm.weight.data
    return weight


def output_layer(model: Any) -> torch.Tensor:
    """[vocab_rows, hidden]; the embedding itself where the two are tied."""
    weight: torch.Tensor = model.get_output_embeddings().weight.data
    return weight


@torch.no_grad()
def rotary_table(model: Any, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each float32 [context, head_dim / 2], attention scaling included.

    transformers' own module makes them, so every kind of scaling is as it has it. `dynamic` changes
    its angles only beyond the context of the configuration, which no sequence here exceeds.
    """
    rotary = model.model.rotary_emb
    device = rotary.inv_freq.device
    positions = torch.arange(context, device=device)[None]
    cos, sin = rotary(torch.zeros(1, 1, device=device, dtype=torch.float32), positions)
    half = cos.shape[-1] // 2
    if not torch.equal(cos[..., :half], cos[..., half:]):
        raise UnsupportedModelError("its rotary embedding does not turn halves")
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _data(bias: torch.nn.Parameter | None) -> torch.Tensor | None:
    return None if bias is None else bias.data
