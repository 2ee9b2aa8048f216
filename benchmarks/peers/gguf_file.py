"""A LLaMA checkpoint as GGUF, by numpy and gguf alone: what OpenVINO GenAI reads."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def convert(checkpoint: Path) -> Path:
    """The checkpoint as GGUF in float16, made beside it if it is not there."""
    path = checkpoint / "f16.gguf"
    if path.is_file():
        return path
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    config = json.loads((checkpoint / "config.json").read_text())
    _describe(writer, config, checkpoint)
    tensors = _tensors(checkpoint / "model.safetensors")

    def add(name: str, tensor: Any) -> None:
        writer.add_tensor(name, tensor.astype(np.float32 if tensor.ndim == 1 else np.float16))

    add("token_embd.weight", tensors["model.embed_tokens.weight"])
    add("output_norm.weight", tensors["model.norm.weight"])
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in _NAMES.items():
            tensor = tensors[f"model.layers.{layer}.{theirs}.weight"]
            if ours in heads:
                tensor = _interleaved(tensor, heads[ours])
            add(f"blk.{layer}.{ours}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)
    return path


def _describe(writer: Any, config: dict[str, Any], checkpoint: Path) -> None:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    writer.add_name(checkpoint.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(1)
    writer.add_size_label(checkpoint.name)
    writer.add_quantization_version(2)
    model = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    tokens += [f"[PAD{place}]" for place in range(len(tokens), config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    merges = model["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(_TEMPLATE)


def _tensors(path: Path) -> dict[str, Any]:
    """All tensors of a safetensors file; numpy knows no bfloat16, so they become float32."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    size = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + size].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        raw = data[start:end]
        if entry["dtype"] == "BF16":
            tensor = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            tensor = raw.view({"F32": np.float32, "F16": np.float16}[entry["dtype"]])
        tensors[name] = tensor.reshape(entry["shape"])
    return tensors


def _interleaved(tensor: Any, heads: int) -> Any:
    """GGUF rotates neighbours, transformers halves: the rows of each head are reordered."""
    rows = tensor.shape[0]
    halves = tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)
