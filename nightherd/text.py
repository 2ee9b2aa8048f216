"""Text to token ids and back: chat templates, prompts, decoding. No torch, no transformers.

A checkpoint's folder is read as transformers reads it, so that the tokens are the same: the
tokenizer (`nightherd.tokenizer`), the special tokens of `tokenizer_config.json` and
`special_tokens_map.json`, the chat template of `chat_template.jinja` or `tokenizer_config.json`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nightherd.chat import ChatTemplate
from nightherd.errors import CheckpointError, ParameterError, RowError
from nightherd.params import SamplingParams, generation_config_layer
from nightherd.tokenizer import load_tokenizer, read_json, special_tokens

PROMPT_TAIL = 8
"""How many last tokens of the prompt give `decode` enough context: twice the longest UTF-8
sequence of single-byte tokens."""

_REPLACEMENT = "\ufffd"
_METASPACE = "\u2581"


class TextProcessor:
    """The text side of one checkpoint. Safe from any thread: nothing changes after `load`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        chat_template: str | None,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any],
        tokenizer_hash: str,
    ) -> None:
        self.tokenizer = tokenizer
        self.special_tokens = dict(special_tokens)
        """By role: `bos_token`, `eos_token`, …"""
        self.tokenizer_hash = tokenizer_hash
        """32 hex digits over tokenizer.json and what else defines the tokenizer."""
        self.template_hash = None if chat_template is None else _hash(chat_template.encode())
        """32 hex digits over the chat template; None without one."""
        self.vocab_size: int = max(tokenizer.get_vocab().values(), default=-1) + 1
        """One more than the greatest token id; a model's own vocabulary is often padded beyond."""
        self.bos_token_id = self._special_token_id("bos_token")
        self.eos_token_ids = self._eos_token_ids(config, generation_config)
        """Tokens that end a text: generation_config.json's, config.json's or the tokenizer's."""
        self.context_length = context_length(config)
        """Prompt and generated tokens together, at most."""
        try:
            self.generation_layer: dict[str, Any] = generation_config_layer(generation_config)
            """The parameters that the checkpoint's generation_config.json sets."""
        except ParameterError as error:
            raise CheckpointError(f"generation_config.json: {error}") from None
        self._chat = None
        if chat_template is not None:
            self._chat = ChatTemplate(chat_template, self.special_tokens)

    @classmethod
    def load(
        cls, folder: Path, chat_template: str | None = None, *, home: Path | None = None
    ) -> TextProcessor:
        """Reads a checkpoint's folder; `chat_template`, if given, replaces the folder's own.

        `home` is the data folder: there lies the converted tokenizer of a checkpoint that has
        only sentencepiece's tokenizer.model. Raises `CheckpointError` naming the file that is
        missing or broken.
        """
        config = read_json(folder, "config.json")
        settings = read_json(folder, "tokenizer_config.json")
        tokenizer, digest = load_tokenizer(folder, settings, config, home)
        return cls(
            tokenizer,
            special_tokens=special_tokens(settings, read_json(folder, "special_tokens_map.json")),
            chat_template=chat_template or find_template(folder, settings),
            config=config,
            generation_config=read_json(folder, "generation_config.json"),
            tokenizer_hash=digest,
        )

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as one text, special tokens included.

        Raises `RowError` (`invalid_request`) without a template, or where the template refuses.
        """
        if self._chat is None:
            raise RowError(
                "invalid_request",
                "the checkpoint has no chat template; give one with --chat-template",
            )
        return self._chat.render(messages, add_generation_prompt)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; raises `RowError` where it is not valid Unicode."""
        encoding = self.tokenizer.encode(_checked_text(text), add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of many texts: on all cores, without the GIL."""
        checked = [_checked_text(text) for text in texts]
        encodings = self.tokenizer.encode_batch_fast(checked, add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in encodings]

    def prepare(self, body: Mapping[str, Any], params: SamplingParams) -> list[int]:
        """The prompt's token ids of one request body, as `nightherd.params.parse_body` made it.

        Raises `RowError` (`invalid_request`) where this checkpoint cannot run it.
        """
        prompt, special = self._prompt_of(body, params)
        ids = self.encode(prompt, special) if isinstance(prompt, str) else prompt
        return self._truncated(ids, params)

    def prepare_many(
        self, items: Sequence[tuple[Mapping[str, Any], SamplingParams]]
    ) -> list[list[int] | RowError]:
        """`prepare` for many requests at once; what one raises is returned at its index."""
        prepared: list[list[int] | RowError] = [[] for _ in items]
        texts: dict[bool, list[tuple[int, str]]] = {True: [], False: []}
        for index, (body, params) in enumerate(items):
            try:
                prompt, special = self._prompt_of(body, params)
                if isinstance(prompt, str):
                    texts[special].append((index, _checked_text(prompt)))
                else:
                    prepared[index] = prompt
            except RowError as error:
                prepared[index] = error
        for special, group in texts.items():
            encoded = self.encode_batch([text for _, text in group], special)
            for (index, _), ids in zip(group, encoded, strict=True):
                prepared[index] = ids
        for index, ((_, params), outcome) in enumerate(zip(items, prepared, strict=True)):
            if not isinstance(outcome, RowError):
                try:
                    prepared[index] = self._truncated(outcome, params)
                except RowError as error:
                    prepared[index] = error
        return prepared

    def decode(
        self,
        token_ids: Sequence[int],
        prompt_tail: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> str:
        """The text of generated tokens, after a prompt that ends with `prompt_tail`.

        Decoders in the manner of sentencepiece drop the space that begins a text, so the tokens
        are decoded behind the last few of the prompt (`PROMPT_TAIL` are enough), whose text is
        then cut off. U+FFFD stands for incomplete UTF-8.
        """
        context, before = self.decoding_context(prompt_tail, skip_special_tokens)
        return self.decode_after(context, before, token_ids, skip_special_tokens)

    def decoding_context(
        self, tail: Sequence[int], skip_special_tokens: bool
    ) -> tuple[list[int], str]:
        """The last tokens of `tail`, from the start of a whole character on, and their text.

        A context that begins within a character would turn the bytes after it into U+FFFD too.
        """
        tail = list(tail[-PROMPT_TAIL:])
        for start in range(min(4, len(tail))):
            text = self.tokenizer.decode(tail[start:], skip_special_tokens=skip_special_tokens)
            if not text.startswith(_REPLACEMENT):
                return tail[start:], text
        return tail, self.tokenizer.decode(tail, skip_special_tokens=skip_special_tokens)

    def decode_after(
        self, context: list[int], before: str, token_ids: Sequence[int], skip_special_tokens: bool
    ) -> str:
        """The text that `token_ids` add behind `context`, whose own text is `before`."""
        text: str = self.tokenizer.decode(
            [*context, *token_ids], skip_special_tokens=skip_special_tokens
        )
        if not text.startswith(before):
            # The context ended within a character, which the first tokens complete.
            before = before.rstrip(_REPLACEMENT)
        if not text.startswith(before):
            return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text[len(before) :]

    def token_bytes(self, token_id: int) -> bytes:
        """A token's bytes, which may be a part of a character; of a special token, its name."""
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added_tokens:
            return token.encode()
        decoders = self._decoder_types
        if "ByteLevel" in decoders:
            table = _byte_level_table()
            if all(char in table for char in token):
                return bytes(table[char] for char in token)
        elif "ByteFallback" in decoders or "Metaspace" in decoders:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace(_METASPACE, " ").encode()
        return str(self.tokenizer.decode([token_id], skip_special_tokens=False)).encode()

    @cached_property
    def _added_tokens(self) -> frozenset[int]:
        return frozenset(self.tokenizer.get_added_tokens_decoder())

    @cached_property
    def _decoder_types(self) -> frozenset[str]:
        if self.tokenizer.decoder is None:
            return frozenset()
        # The library shows the parts of a sequence of decoders only in its pickled form, JSON.
        state = json.loads(self.tokenizer.decoder.__getstate__())
        return frozenset(part["type"] for part in [state, *state.get("decoders", [])])

    def _special_token_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self.tokenizer.token_to_id(token)

    def _eos_token_ids(
        self, config: Mapping[str, Any], generation_config: Mapping[str, Any]
    ) -> frozenset[int]:
        for source in (generation_config, config, config.get("text_config") or {}):
            given = source.get("eos_token_id")
            if isinstance(given, int):
                return frozenset([given])
            if given:
                return frozenset(given)
        own = self._special_token_id("eos_token")
        return frozenset() if own is None else frozenset([own])

    def _prompt_of(
        self, body: Mapping[str, Any], params: SamplingParams
    ) -> tuple[str | list[int], bool]:
        """The prompt as text to encode or as token ids, and whether to add special tokens."""
        prompt = body.get("prompt")
        messages = body.get("messages")
        if messages is not None and (self.has_chat_template or prompt is None):
            # The template has written the special tokens: adding them again would double the bos.
            return self.render_chat(messages), bool(params.add_special_tokens)
        if isinstance(prompt, str):
            return prompt, params.add_special_tokens is not False
        if not isinstance(prompt, list | tuple):
            raise RowError("invalid_request", "neither a prompt nor messages")
        for token_id in prompt:
            if not 0 <= token_id < self.vocab_size:
                raise RowError(
                    "invalid_request",
                    f"prompt token id {token_id} is not in the vocabulary (0 to "
                    f"{self.vocab_size - 1})",
                )
        return list(prompt), False

    def _truncated(self, ids: list[int], params: SamplingParams) -> list[int]:
        """The prompt cut to `truncate_prompt_tokens`; of an empty one, the bos token alone."""
        if params.truncate_prompt_tokens is not None:
            ids = ids[-params.truncate_prompt_tokens :]
        if ids:
            return ids
        if self.bos_token_id is None:
            raise RowError("invalid_request", "the prompt is empty")
        return [self.bos_token_id]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _checked_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError(
            "invalid_request",
            f"the text has half a surrogate pair, {text[error.start]!r}, at character "
            f"{error.start}: it is not valid Unicode",
        ) from None
    return text


def context_length(config: Mapping[str, Any]) -> int:
    """Prompt and generated tokens together, at most; raises `CheckpointError` where none is set."""
    for source in (config, config.get("text_config") or {}):
        length = source.get("max_position_embeddings")
        if isinstance(length, int) and length > 0:
            return length
    raise CheckpointError("config.json has no max_position_embeddings, the length of the context")


def find_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template of a checkpoint: its own file goes before tokenizer_config.json."""
    try:
        return (folder / "chat_template.jinja").read_text("utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'chat_template.jinja'} cannot be read: {error}") from None
    given = settings.get("chat_template")
    if isinstance(given, str):
        return given
    if isinstance(given, list):
        for entry in given:
            if entry.get("name") == "default":
                return str(entry["template"])
    return None


@cache
def _byte_level_table() -> dict[str, int]:
    """By each character that byte-level BPE (GPT-2) writes for a byte, that byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {chr(byte): byte for byte in shown}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(hidden)})
    return table
