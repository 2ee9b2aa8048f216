"""Checkpoints as people have them: each generation of LLaMA by its own config, files, tokenizer.

The configs are those of the public repositories, made small: the same keys, the same spelling
(`rope_theta` and `rope_scaling` at the top, as transformers 4 wrote them).
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import CHAT_TEMPLATE, CORPUS, byte_level_tokenizer, tiny_llama

ROPE_3_1 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}


@dataclass(frozen=True)
class Layout:
    """One generation: config.json beyond the sizes, tokenizer_config.json, and its files."""

    config: Mapping[str, Any]
    tokenizer: str
    """`tokenizer.json`, `tokenizer.model` (alone), or `both`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    shards: int = 1
    kv_heads: int = 4
    template: bool = False
    extra_tensors: Sequence[str] = ()


def token(content: str, **changes: bool) -> dict[str, Any]:
    return {
        "__type": "AddedToken",
        "content": content,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        **changes,
    }


_LLAMA_2 = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": token("<s>"),
    "eos_token": token("</s>"),
    "unk_token": token("<unk>"),
    "clean_up_tokenization_spaces": False,
    "legacy": False,
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": None,
    "padding_side": "right",
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
}
_LLAMA_3 = {
    "bos_token": "<|begin|>",
    "eos_token": "<|end|>",
    "clean_up_tokenization_spaces": True,
    "model_input_names": ["input_ids", "attention_mask"],
    "model_max_length": 131072,
    "tokenizer_class": "PreTrainedTokenizerFast",
}
_CODE = {
    **_LLAMA_2,
    "legacy": None,
    "tokenizer_class": "CodeLlamaTokenizer",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
    "middle_token": "▁<MID>",
    "prefix_token": "▁<PRE>",
    "suffix_token": "▁<SUF>",
    "suffix_first": False,
}

LAYOUTS: dict[str, Layout] = {
    "llama-1": Layout(
        {"max_position_embeddings": 2048, "pad_token_id": 0, "rms_norm_eps": 1e-06},
        "tokenizer.model",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": token("<s>", normalized=True),
            "eos_token": token("</s>", normalized=True),
            "unk_token": token("<unk>", normalized=True),
            "model_max_length": 2048,
            "tokenizer_class": "LlamaTokenizer",
        },
        extra_tensors=("model.layers.0.self_attn.rotary_emb.inv_freq",),
    ),
    "llama-2": Layout(
        {"max_position_embeddings": 4096, "rope_scaling": None, "pretraining_tp": 1},
        "both",
        _LLAMA_2,
        shards=2,
    ),
    "llama-3": Layout(
        {"max_position_embeddings": 8192, "rope_theta": 500000.0, "rope_scaling": None},
        "tokenizer.json",
        _LLAMA_3,
        shards=4,
        kv_heads=2,
        template=True,
    ),
    "llama-3.1": Layout(
        {
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": ROPE_3_1,
            "eos_token_id": [1, 2],
            "mlp_bias": False,
        },
        "tokenizer.json",
        _LLAMA_3,
        shards=4,
        kv_heads=2,
        template=True,
    ),
    "llama-3.2": Layout(
        {
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": {**ROPE_3_1, "factor": 32.0},
            "head_dim": 32,
            "tie_word_embeddings": True,
        },
        "tokenizer.json",
        _LLAMA_3,
        kv_heads=2,
    ),
    "code-llama": Layout(
        {"max_position_embeddings": 16384, "rope_theta": 1000000, "rope_scaling": None},
        "both",
        _CODE,
        shards=2,
    ),
    "tinyllama": Layout(
        {"max_position_embeddings": 2048, "rope_theta": 10000.0, "rope_scaling": None},
        "both",
        {**_LLAMA_2, "clean_up_tokenization_spaces": None},
        kv_heads=1,
        template=True,
    ),
}


def sizes(layout: Layout) -> dict[str, int]:
    return {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": layout.kv_heads,
        "vocab_size": 512,
    }


def source_model(layout: Layout) -> Any:
    """The model of a layout as transformers 5 itself configures it, random, float32."""
    config = dict(layout.config)
    rope = {"rope_type": "default", **(config.pop("rope_scaling", None) or {})}
    rope["rope_theta"] = float(config.pop("rope_theta", 10000.0))
    config.pop("pretraining_tp", None)
    return tiny_llama(rope_parameters=rope, **{**sizes(layout), **config})


def write_layout(folder: Path, name: str, model: Any = None) -> Any:
    """Writes a checkpoint in a layout; returns the model that it holds."""
    layout = LAYOUTS[name]
    folder.mkdir(parents=True)
    model = model or source_model(layout)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
        "use_cache": True,
        **sizes(layout),
        **layout.config,
    }
    if name == "llama-1":
        del config["num_key_value_heads"]
    write_json(folder / "config.json", config)
    write_shards(folder, model, layout)
    settings = dict(layout.settings)
    if layout.template:
        settings["chat_template"] = CHAT_TEMPLATE
    write_json(folder / "tokenizer_config.json", settings)
    write_tokenizer(folder, layout.tokenizer, byte_level=layout.settings is _LLAMA_3)
    return model


def write_shards(folder: Path, model: Any, layout: Layout) -> None:
    tensors = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if layout.config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
    for name in layout.extra_tensors:
        tensors[name] = torch.ones(16)
    if layout.shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    placed = {}
    names = list(tensors)
    for shard in range(layout.shards):
        file = f"model-{shard + 1:05}-of-{layout.shards:05}.safetensors"
        own = {name: tensors[name] for name in names[shard :: layout.shards]}
        save_file(own, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(own, file)
    total = sum(value.numel() * 4 for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


# Tokenizers.


def need(*packages: str) -> None:
    """Skips a test where a package is missing; in CI it is never missing."""
    for package in packages:
        if os.environ.get("CI"):
            __import__(package)
        else:
            pytest.importorskip(package)


def write_sentencepiece(folder: Path) -> None:
    """Trains a sentencepiece model of LLaMA's kind (BPE, byte fallback, digits apart)."""
    need("sentencepiece", "google.protobuf")
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        normalization_rule_name="identity",
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


def write_tokenizer(folder: Path, kind: str, *, byte_level: bool = False) -> None:
    if byte_level:
        byte_level_tokenizer().save(str(folder / "tokenizer.json"))
        return
    write_sentencepiece(folder)
    if kind == "both":
        write_json(folder / "tokenizer.json", published_tokenizer(folder))


def published_tokenizer(folder: Path) -> dict[str, Any]:
    """The tokenizer.json that stands beside a tokenizer.model in the public repositories."""
    from transformers import LlamaTokenizer

    made: Any = LlamaTokenizer.from_pretrained(folder)
    state: dict[str, Any] = json.loads(made.backend_tokenizer.to_str())
    state["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    state["pre_tokenizer"] = None
    state["model"]["unk_token"] = "<unk>"
    begin, first = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"id": "A", "type_id": 0}
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": first}],
        "pair": [begin, {"Sequence": first}, begin, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return state


# Meta's original format.


def write_meta(
    folder: Path,
    model: Any,
    *,
    files: int = 1,
    embedding_dim: int = 1,
    dtype: torch.dtype = torch.float32,
    **params: Any,
) -> None:
    """A model in Meta's format: pairs rotated, and cut into as many files as there were GPUs."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    write_json(
        folder / "params.json",
        {
            "dim": config.hidden_size,
            "n_layers": config.num_hidden_layers,
            "n_heads": config.num_attention_heads,
            "multiple_of": 256,
            "norm_eps": config.rms_norm_eps,
            "vocab_size": -1,
            **params,
        },
    )
    tensors = model.state_dict()
    whole: dict[str, tuple[torch.Tensor, int | None]] = {
        "tok_embeddings.weight": (tensors["model.embed_tokens.weight"], embedding_dim),
        "norm.weight": (tensors["model.norm.weight"], None),
        "output.weight": (tensors["lm_head.weight"], 0),
        "rope.freqs": (torch.ones(16), None),
    }
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        own, theirs = f"model.layers.{layer}", f"layers.{layer}"
        for name in "qkvo":
            weight = tensors[f"{own}.self_attn.{name}_proj.weight"]
            if name in heads:
                weight = _pairs(weight, heads[name])
            whole[f"{theirs}.attention.w{name}.weight"] = (weight, 1 if name == "o" else 0)
        for number, name, dim in ((1, "gate", 0), (2, "down", 1), (3, "up", 0)):
            weight = tensors[f"{own}.mlp.{name}_proj.weight"]
            whole[f"{theirs}.feed_forward.w{number}.weight"] = (weight, dim)
        for short, name in (("attention", "input"), ("ffn", "post_attention")):
            weight = tensors[f"{own}.{name}_layernorm.weight"]
            whole[f"{theirs}.{short}_norm.weight"] = (weight, None)
    for index in range(files):
        part = {
            name: (weight if dim is None else weight.chunk(files, dim)[index]).clone().to(dtype)
            for name, (weight, dim) in whole.items()
        }
        torch.save(part, folder / f"consolidated.{index:02}.pth")


def _pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_tiktoken(folder: Path) -> dict[bytes, int]:
    """A tokenizer.model as Llama 3 has it: every byte, then what merging the corpus gives."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    pieces = [[bytes([byte]) for byte in text.encode()] for text in CORPUS]
    while len(ranks) < 320:
        counts: dict[bytes, int] = {}
        for piece in pieces:
            for left, right in pairwise(piece):
                counts[left + right] = counts.get(left + right, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        ranks[best] = len(ranks)
        pieces = [merged(piece, best) for piece in pieces]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(one).decode()} {rank}" for one, rank in ranks.items()]
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")
    return ranks


def merged(piece: list[bytes], pair: bytes) -> list[bytes]:
    out: list[bytes] = []
    for part in piece:
        if out and out[-1] + part == pair:
            out[-1] += part
        else:
            out.append(part)
    return out
