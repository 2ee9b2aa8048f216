"""The tokenizer in a checkpoint's folder, built as transformers builds it. No transformers.

tokenizer.json does not define all of it. From a checkpoint whose class is LlamaTokenizer or
CodeLlamaTokenizer transformers takes the vocabulary, the merges and the special tokens alone, and
makes the rest of the pipeline anew; and whatever the class is, it adds special tokens that are
named beside the file. Both are done here, so that the token ids are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from nightherd.errors import CheckpointError

CONVERTED = "tokenizers"
"""The folder, in the data folder, of tokenizers that were converted from sentencepiece models."""

_SENTENCEPIECE = "tokenizer.model"
_INFILLING = {
    "prefix_token": "▁<PRE>",
    "middle_token": "▁<MID>",
    "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>",
    "fill_token": "<FILL_ME>",
}
"""What CodeLlamaTokenizer names unless tokenizer_config.json does."""


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in `folder/name`, empty if there is no such file.

    Raises `CheckpointError` where it cannot be read or is no object.
    """
    path = folder / name
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise _broken(path, error) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; download or copy it again")
    return value


def _broken(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(f"{path} cannot be read: {reason}; download or copy it again")


def converted_path(folder: Path, home: Path) -> Path | None:
    """Where the converted tokenizer of a folder is (to be) kept, below the data folder.

    None where there is nothing to convert: the folder has a tokenizer.json, or no tokenizer.model.
    """
    if (folder / "tokenizer.json").exists() or not (folder / _SENTENCEPIECE).exists():
        return None
    digest = hashlib.sha256()
    # All files that decide what transformers makes of it.
    for name in (
        _SENTENCEPIECE,
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ):
        try:
            data = (folder / name).read_bytes()
        except FileNotFoundError:
            data = b""
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}") from None
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return home / CONVERTED / f"{digest.hexdigest()[:32]}.json"


def load_tokenizer(
    folder: Path,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    home: Path | None = None,
) -> tuple[Tokenizer, str]:
    """The tokenizer of a folder and the hash of what defines it, 32 hex digits.

    `settings` is tokenizer_config.json, `config` config.json, `home` the data folder, where a
    converted tokenizer.model is looked for. Raises `CheckpointError` naming what is missing or
    broken.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        path = _converted(folder, home)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    family = _class_name(settings, config)
    rebuilt = (
        family in ("LlamaTokenizer", "CodeLlamaTokenizer")
        and config.get("model_type") == "llama"
        and path.name == "tokenizer.json"
        # Llama 3 under the name of Llama 2's class: there transformers obeys the file.
        and b'"ByteLevel"' not in raw
    )
    try:
        if rebuilt:
            state, added = _class_pipeline(family, json.loads(raw), settings)
            tokenizer = Tokenizer.from_str(json.dumps(state))
            tokenizer.add_tokens(added)
        else:
            tokenizer = Tokenizer.from_buffer(raw)
    except Exception as error:  # tokenizers raises plain Exception
        raise _broken(path, error) from None
    if path.name == "tokenizer.json":
        extra = _INFILLING | dict(settings) if family == "CodeLlamaTokenizer" else settings
        _add_named_tokens(tokenizer, folder, extra)
        if family == "CodeLlamaTokenizer" and rebuilt:
            _prepend_bos(tokenizer, str(_content(settings.get("bos_token")) or "<s>"))
    # A file may have been saved with these switched on; prompts are never cut or padded here.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    digest = hashlib.sha256(raw)
    if rebuilt:
        pipeline = {name: part for name, part in state.items() if name != "model"}
        digest.update(json.dumps(pipeline, sort_keys=True).encode())
    return tokenizer, digest.hexdigest()[:32]


def _converted(folder: Path, home: Path | None) -> Path:
    """The file that a worker made of tokenizer.model; raises `CheckpointError` without one."""
    path = None if home is None else converted_path(folder, home)
    if path is not None and path.exists():
        return path
    hint = ""
    if (folder / _SENTENCEPIECE).exists():
        hint = f"; convert its {_SENTENCEPIECE}: nightherd checkpoint check {folder}"
    raise CheckpointError(f"no tokenizer.json in {folder}{hint}")


def _class_name(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    name = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    return str(name).removesuffix("Fast")


def _class_pipeline(
    family: str, state: dict[str, Any], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[AddedToken]]:
    """The state of a tokenizer as its class makes it, and the tokens to add to it."""
    code_llama = family == "CodeLlamaTokenizer"
    prefix = settings.get("add_prefix_space") is not False
    scheme = "always" if settings.get("legacy") and not code_llama else "first"
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix or code_llama:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = state["model"]
    unknown = _content(settings.get("unk_token", "<unk>"))
    new_state = {
        **state,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": scheme if prefix else "never",
            "split": False,
        },
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown if code_llama else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": model["vocab"],
            "merges": model["merges"],
        },
        "added_tokens": [],
    }
    listed = settings.get("added_tokens_decoder")
    if listed is None:
        entries = {entry["id"]: entry for entry in state.get("added_tokens", [])}
    else:
        entries = {int(token_id): entry for token_id, entry in listed.items()}
    return new_state, [
        _added_token(entries[token_id], special=False) for token_id in sorted(entries)
    ]


def _add_named_tokens(tokenizer: Tokenizer, folder: Path, settings: Mapping[str, Any]) -> None:
    """Adds the special tokens that other files than tokenizer.json name."""
    merged = dict(settings)
    older = "added_tokens_decoder" not in settings
    if older:
        merged.update(read_json(folder, "special_tokens_map.json"))
    roles = [value for name, value in merged.items() if name.endswith("_token")]
    extra = merged.get("extra_special_tokens") or merged.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        extra = list(extra.values())
    special = [token for token in (*roles, *extra) if _content(token)]
    wanted: list[AddedToken] = []
    if older:
        names = {_content(token) for token in special}
        numbered = read_json(folder, "added_tokens.json")
        for name in sorted(numbered, key=lambda name: int(numbered[name])):
            wanted.append(AddedToken(name, normalized=name not in names, special=name in names))
    else:
        decoder = settings["added_tokens_decoder"]
        wanted += [_added_token(decoder[key], special=False) for key in sorted(decoder, key=int)]
    wanted += [_added_token(token, special=True) for token in special]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in wanted:
        if token.content not in known:
            known.add(token.content)
            tokenizer.add_tokens([token])


def _prepend_bos(tokenizer: Tokenizer, token: str) -> None:
    """Makes encoding with special tokens begin with `token`, where the vocabulary has it."""
    from tokenizers.processors import TemplateProcessing

    token_id = tokenizer.token_to_id(token)
    if token_id is not None:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{token}:0 $A:0",
            pair=f"{token}:0 $A:0 {token}:1 $B:1",
            special_tokens=[(token, token_id)],
        )


def _content(token: object) -> str | None:
    """The text of a token that is given as a string, or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _added_token(token: str | Mapping[str, Any], special: bool) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=special, normalized=not special)
    options = {
        name: bool(token[name])
        for name in ("lstrip", "rstrip", "normalized", "single_word", "special")
        if name in token
    }
    if special:
        options["special"] = True
    return AddedToken(str(token["content"]), **options)


def special_tokens(settings: Mapping[str, Any], legacy: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role, as transformers merges them.

    special_tokens_map.json counts only beside a tokenizer_config.json of the older kind.
    """
    merged = dict(settings)
    if "added_tokens_decoder" not in settings:
        merged.update(legacy)
    return dict(_by_role(merged.items()))


def _by_role(items: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, str]]:
    for role, value in items:
        content = _content(value)
        if role.endswith("_token") and content is not None:
            yield role, content
