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
    # To try benchmarks themselves, on any machine.
    "T": Shape(256, 512, 3, 4, 2, vocab=8192, tokenizer=8000, tied=False),
    "S": Shape(288, 768, 6, 6, 6, vocab=8192, tokenizer=8000),
    "M": Shape(576, 1536, 30, 9, 3, vocab=32000, tokenizer=32000),
    # Llama-3.2-1B.
    "L": Shape(2048, 8192, 16, 32, 8, vocab=128256, tokenizer=32000),
    # Llama-3.1-8B and Llama-2-7B: for cards.
    "8B": Shape(4096, 14336, 32, 32, 8, vocab=128256, tokenizer=32000, tied=False),
    "7B": Shape(4096, 11008, 32, 32, 32, vocab=32000, tokenizer=32000, tied=False),
}


def checkpoint(name: str, dtype: str, cache: Path, *, weights: bool = True) -> Path:
    """The folder of a shape's checkpoint in `float32` or `bfloat16`, made if it is not there;
    without `weights` for those who make them with `random_model`."""
    folder = cache / (f"{name}-{dtype}" if weights else f"{name}-empty")
    if (folder / "config.json").is_file():
        return folder
    made = cache / f".{folder.name}"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    _write(name, dtype if weights else None, made)
    made.rename(folder)
    return folder


def _write(name: str, dtype: str | None, folder: Path) -> None:
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if dtype is None:
        llama_config(name).save_pretrained(folder)
    else:
        # A card makes billions of random numbers in seconds, a CPU in minutes.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = random_model(name, "float32", device)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
    _tokenizer(SHAPES[name].tokenizer).save_pretrained(folder)


def llama_config(name: str, context: int = CONTEXT, **more: Any) -> Any:
    from transformers import LlamaConfig

    shape = SHAPES[name]
    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=context,
        tie_word_embeddings=shape.tied,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **more,
    )


def random_model(name: str, dtype: str, device: str, context: int = CONTEXT, **more: Any) -> Any:
    """A LLaMA with random weights of a fixed seed, made where it is to be: no file, no copy."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(_SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(llama_config(name, context, **more))
        # Angles are float32 in every precision, as from_pretrained leaves them.
        torch.set_default_dtype(torch.float32)
        with torch.device(device):
            model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


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
