"""Checkpoints with random weights and the shapes of real ones, written once to a folder."""

from __future__ import annotations

import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = 2048
_SEED = 0
_SPECIAL = ["<unk>", "<s>", "</s>"]
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a LLaMA model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tokenizer: int
    """Tokens that the tokenizer is trained to; the other rows are padding."""
    tied: bool = True
    """Whether the output layer is the embedding."""

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """[inputs, outputs] of a layer's matrices, joined as engines join them."""
        kv = self.kv_heads * self.head_dim
        return {
            "qkv": (self.hidden, self.hidden + 2 * kv),
            "o": (self.hidden, self.hidden),
            "gate_up": (self.hidden, 2 * self.intermediate),
            "down": (self.intermediate, self.hidden),
        }

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices: each token is multiplied with them."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def output_weights(self) -> int:
        """Weights of the output layer: only tokens that choose are multiplied with them."""
        return self.hidden * self.vocab

    def kv_bytes_per_token(self, itemsize: int) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


SHAPES = {
    "S": Shape(288, 768, 6, 6, 6, vocab=8192, tokenizer=8000),
    "M": Shape(576, 1536, 30, 9, 3, vocab=32000, tokenizer=32000),
    # Llama-3.2-1B.
    "L": Shape(2048, 8192, 16, 32, 8, vocab=128256, tokenizer=32000),
    # Llama-3.1-8B and Llama-2-7B: for cards.
    "8B": Shape(4096, 14336, 32, 32, 8, vocab=128256, tokenizer=32000, tied=False),
    "7B": Shape(4096, 11008, 32, 32, 32, vocab=32000, tokenizer=32000, tied=False),
}


def checkpoint(name: str, dtype: str, cache: Path) -> Path:
    """The folder of a shape's checkpoint in `float32` or `bfloat16`, made if it is not there."""
    folder = cache / f"{name}-{dtype}"
    if (folder / "config.json").is_file():
        return folder
    made = cache / f".{folder.name}"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    _write(SHAPES[name], dtype, made)
    made.rename(folder)
    return folder


def _write(shape: Shape, dtype: str, folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=shape.tied,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    logging.disable_progress_bar()
    torch.manual_seed(_SEED)
    # A card makes billions of random numbers in seconds, a CPU in minutes.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    _tokenizer(shape.tokenizer).save_pretrained(folder)


def _tokenizer(size: int) -> Any:
    """A byte-level BPE, trained on Python's own library: there on every machine."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library = Path(sysconfig.get_paths()["stdlib"])
    tokenizer.train([str(path) for path in sorted(library.glob("*.py"))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=_SPECIAL[0],
        bos_token=_SPECIAL[1],
        eos_token=_SPECIAL[2],
        pad_token=_SPECIAL[2],
        model_max_length=CONTEXT,
        chat_template=_TEMPLATE,
    )
