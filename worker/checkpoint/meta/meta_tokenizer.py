"""The tokenizers of Meta's original format, in the files that transformers reads.

LLaMA 1, 2 and Code Llama bring a sentencepiece model, which is copied. Llama 3 brings tiktoken's
format: a line a token, its bytes in base64 and its rank. The merges of byte-level BPE follow from
the ranks: a token is made of the two whose ranks let them be joined first.
"""

from __future__ import annotations

import base64
import binascii
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from nightherd.errors import CheckpointError

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BEGIN, _END = "<|begin_of_text|>", "<|end_of_text|>"
_LLAMA_3 = (
    _BEGIN, _END, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|reserved_special_token_2|>", "<|reserved_special_token_3|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
)  # fmt: skip
_LLAMA_3_1 = (
    _BEGIN, _END, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip

_CHAT_2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('after an optional system message, user and assistant take turns') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim"
    " + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
_CHAT_3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)


@dataclass(frozen=True, slots=True)
class WrittenTokenizer:
    """What the rest of the checkpoint must know of its tokenizer."""

    bos_token_id: int
    eos_token_ids: tuple[int, ...]
    settings: dict[str, Any]
    """tokenizer_config.json."""


def is_tiktoken(path: Path) -> bool:
    """Whether a tokenizer.model is tiktoken's and not sentencepiece's."""
    with path.open("rb") as file:
        first = file.readline(200).split()
    try:
        return (
            len(first) == 2
            and first[1].isdigit()
            and bool(base64.b64decode(first[0], validate=True))
        )
    except binascii.Error:
        return False


def write_sentencepiece(model: Path, folder: Path, *, chat: bool, context: int) -> WrittenTokenizer:
    """Copies the model of LLaMA 1, 2 or Code Llama, beside the settings that go with it."""
    shutil.copyfile(model, folder / "tokenizer.model")
    settings: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        # As Meta encodes each turn of a chat: a space before every piece of text.
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    if chat:
        settings["chat_template"] = _CHAT_2
    return WrittenTokenizer(1, (2,), settings)


def write_tiktoken(
    model: Path, folder: Path, *, rows: int, newer: bool, chat: bool, context: int
) -> WrittenTokenizer:
    """Writes the tokenizer.json of Llama 3; `newer` are 3.1 and later.

    `rows` is the size of the embedding, specials included.
    """
    ranks = _read_ranks(model)
    names = _special_names(_LLAMA_3_1 if newer else _LLAMA_3, rows - len(ranks))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={_bpe_spelling(token): rank for token, rank in ranks.items()},
            merges=[(_bpe_spelling(left), _bpe_spelling(right)) for left, right in _merges(ranks)],
            ignore_merges=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in names]
    )
    begin = len(ranks)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{_BEGIN}:0 $A:0",
                pair=f"{_BEGIN}:0 $A:0 {_BEGIN}:1 $B:1",
                special_tokens=[(_BEGIN, begin)],
            ),
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = (_END, "<|eom_id|>", "<|eot_id|>") if chat else (_END,)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _BEGIN,
        "eos_token": "<|eot_id|>" if chat else _END,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context,
    }
    if chat:
        settings["chat_template"] = _CHAT_3
    ids = tuple(begin + names.index(name) for name in ends if name in names)
    return WrittenTokenizer(begin, ids, settings)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no tokenizer of tiktoken: {error}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{path} is broken: its ranks have gaps; download or copy it again")
    return ranks


def _special_names(first: Sequence[str], count: int) -> list[str]:
    """The named special tokens, then reserved ones up to the size of the embedding."""
    if count < len(first):
        raise CheckpointError(
            f"the embedding has {count} rows beyond the tokenizer's, Llama 3 has at least "
            f"{len(first)} special tokens; the tokenizer is another model's"
        )
    reserved = sum("reserved_special" in name for name in first)
    more = count - len(first)
    return [*first, *(f"<|reserved_special_token_{reserved + i}|>" for i in range(more))]


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [
            (token[:cut], token[cut:])
            for cut in range(1, len(token))
            if token[:cut] in ranks and token[cut:] in ranks
        ]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _byte_names() -> list[str]:
    """The character that byte-level BPE (GPT-2) writes for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    names = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        names.setdefault(byte, chr(0x100 + len(names) - len(printable)))
    return [names[byte] for byte in range(256)]


_NAMES = _byte_names()


def _bpe_spelling(token: bytes) -> str:
    return "".join(_NAMES[byte] for byte in token)
