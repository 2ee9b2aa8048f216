"""Tiny checkpoints, made on the spot: tokenizers of the two kinds in use, random LLaMA weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CORPUS = [
    "Once upon a time there was a small lighthouse by the sea, and its keeper was called Ada.",
    'She had 27 lamps; "why so many?" asked the captain. It\'s because the night is long!',
    "Größe, façade, naïve, 東京, здравствуйте, emoji 🎉 and tabs\tand\nnew lines.",
    "the the the ship sailed on and on, until the morning came and the herd went home",
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "<|{{ message['role'] }}|>\n{{ message['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}\n{% if add_generation_prompt %}<|assistant|>\n{% endif %}\n"
)


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE with `<|begin|>` added before a text, in the manner of Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|begin|>", "<|end|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """BPE over `▁` with byte fallback, as Llama 2's tokenizer.json is written."""
    alphabet = sorted(set("".join(CORPUS[:2]).replace(" ", "▁")))
    base = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    base.train_from_iterator(
        CORPUS[:2] + CORPUS[3:],
        tokenizers.trainers.BpeTrainer(
            vocab_size=440,
            special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    state = json.loads(base.to_str())
    # The bytes were only trained as special tokens; in a real file they are plain vocabulary.
    state["added_tokens"] = state["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def write_text_files(
    folder: Path, kind: str = "byte-level", *, template: str | None = CHAT_TEMPLATE, **settings: Any
) -> Path:
    """The text side of a checkpoint in `folder`: no weights. `settings` go to
    tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "byte-level":
        tokenizer, bos, eos = byte_level_tokenizer(), "<|begin|>", "<|end|>"
    else:
        tokenizer, bos, eos = metaspace_tokenizer(), "<s>", "</s>"
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "max_position_embeddings": 256,
                "eos_token_id": tokenizer.token_to_id(eos),
                "bos_token_id": tokenizer.token_to_id(bos),
            }
        )
    )
    return folder


def tiny_llama(vocab_size: int = 512, **changes: Any) -> Any:
    """A random LLaMA in float32, sharp enough that a wrong computation changes its tokens.

    At transformers' defaults (tied embeddings, deviation 0.02) greedy output repeats itself for
    ever whatever the model computes.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        **{
            "vocab_size": vocab_size,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": None,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


def write_checkpoint(folder: Path, kind: str = "byte-level", **changes: Any) -> Path:
    """A whole checkpoint: weights in bfloat16 and text files."""
    import torch

    model = tiny_llama(**changes)
    model.to(torch.bfloat16).save_pretrained(folder)
    config = (folder / "config.json").read_text()
    write_text_files(folder, kind)
    (folder / "config.json").write_text(config)
    return folder
