"""Token ids are those of transformers' own AutoTokenizer, whatever files a checkpoint has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from transformers.utils import logging

from nightherd.errors import CheckpointError
from nightherd.text import TextProcessor
from nightherd.tokenizer import converted_path
from tests.checkpoints import CHAT_TEMPLATE, CORPUS, write_text_files
from tests.layouts import LAYOUTS, need, published_tokenizer, write_json, write_sentencepiece
from worker.checkpoint import sentencepiece_tokenizer
from worker.checkpoint.load import load_text

TEXTS = [
    *CORPUS,
    "",
    " ",
    "  two spaces first",
    "ends in a space ",
    "a </s> b <s>c",
    "<s>[INST] Hello, Ada [/INST] Good evening </s><s>[INST] 1234 12 [/INST]",
    "tabs\tand\n\nbreaks\n",
    "한국어 ไทย \U0001f3f3\ufe0f",
    "▁▁written as it is stored",
    "[PAD]x<|y|>[INST]▁<PRE>",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained tokenizer.model and a config, no more."""
    folder = tmp_path_factory.mktemp("model")
    write_sentencepiece(folder)
    write_json(folder / "config.json", {"model_type": "llama", "max_position_embeddings": 256})
    return folder


@pytest.fixture(scope="module")
def published(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a tokenizer.json, as the public repositories have both."""
    folder = tmp_path_factory.mktemp("published") / "both"
    shutil.copytree(model, folder)
    write_json(folder / "tokenizer.json", published_tokenizer(model))
    return folder


def variant(source: Path, folder: Path, settings: dict[str, Any] | None, **files: Any) -> Path:
    shutil.copytree(source, folder)
    if settings is not None:
        write_json(folder / "tokenizer_config.json", settings)
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder


def assert_equal(folder: Path, home: Path) -> TextProcessor:
    logging.set_verbosity_error()
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    ours = load_text(folder, home)
    assert ours.vocab_size == len(theirs)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, special) == ids, text
        decoded = theirs.backend_tokenizer.decode(ids, skip_special_tokens=False)
        assert ours.tokenizer.decode(ids, skip_special_tokens=False) == decoded
    return ours


LLAMA_2 = dict(LAYOUTS["llama-2"].settings)
CODE = dict(LAYOUTS["code-llama"].settings)
NUMBERED = {
    str(token_id): {"content": content, "lstrip": False, "normalized": token_id == 480,
                    "rstrip": token_id == 480, "single_word": False, "special": token_id < 480}
    for token_id, content in ((0, "<unk>"), (1, "<s>"), (2, "</s>"), (480, "[INST]"))
}  # fmt: skip
VARIANTS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "no settings": (None, {}),
    "llama 1": (dict(LAYOUTS["llama-1"].settings), {}),
    "llama 2": (LLAMA_2, {}),
    "llama 2, legacy": ({**LLAMA_2, "legacy": True}, {}),
    "llama 2, older": ({**LLAMA_2, "legacy": None, "tokenizer_class": "LlamaTokenizerFast"}, {}),
    "llama 2, a pad token more": ({**LLAMA_2, "pad_token": "[PAD]"}, {}),
    "llama 2, no space first": ({**LLAMA_2, "add_prefix_space": False}, {}),
    "llama 2, no bos": ({**LLAMA_2, "add_bos_token": False, "add_eos_token": True}, {}),
    "llama 2, silent": ({"tokenizer_class": "LlamaTokenizer"}, {}),
    "llama 2, numbered tokens": ({**LLAMA_2, "added_tokens_decoder": NUMBERED}, {}),
    "llama 2, older files": (
        LLAMA_2,
        {
            "special_tokens_map": {"pad_token": "[PAD]", "additional_special_tokens": ["<|y|>"]},
            "added_tokens": {"[PAD]": 480, "[INST]": 481},
        },
    ),
    "code llama": (CODE, {}),
    "code llama, no infilling": ({**CODE, "prefix_token": None, "fill_token": None}, {}),
    "its file alone": (
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
         "extra_special_tokens": ["<|y|>"]},
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_with_a_tokenizer_json(published: Path, tmp_path: Path, name: str) -> None:
    settings, files = VARIANTS[name]
    folder = variant(published, tmp_path / "variant", settings, **files)
    assert_equal(folder, tmp_path)
    assert not (tmp_path / "tokenizers").exists()


@pytest.mark.parametrize("name", VARIANTS)
def test_with_a_sentencepiece_model_alone(model: Path, tmp_path: Path, name: str) -> None:
    settings, files = VARIANTS[name]
    folder = variant(model, tmp_path / "variant", settings, **files)
    assert_equal(folder, tmp_path)


def test_llama_3_under_the_name_of_llama_2s_class(tmp_path: Path) -> None:
    """Its tokenizer.json is byte-level, and obeyed; transformers does so since 5.2x."""
    plain = write_text_files(tmp_path / "plain")
    named = write_text_files(tmp_path / "named", tokenizer_class="LlamaTokenizerFast")
    ours, theirs = TextProcessor.load(named), AutoTokenizer.from_pretrained(plain)
    for text in TEXTS:
        assert ours.encode(text, True) == theirs(text)["input_ids"]


def test_a_chat_of_llama_2_has_the_tokens_of_transformers(published: Path, tmp_path: Path) -> None:
    settings = {**LLAMA_2, "chat_template": CHAT_TEMPLATE}
    folder = variant(published, tmp_path / "chat", settings)
    chat = [{"role": "user", "content": "Hello, Ada"}]
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    ours = TextProcessor.load(folder)
    assert ours.encode(ours.render_chat(chat), False) == ids


def test_a_conversion_is_kept_and_used(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = variant(model, tmp_path / "sp", LLAMA_2)
    first = load_text(folder, tmp_path)
    (path,) = (tmp_path / "tokenizers").iterdir()
    assert path == converted_path(folder, tmp_path)
    # Now without the packages, and without a worker: the text side alone finds it.
    monkeypatch.setattr(sentencepiece_tokenizer, "_installed", lambda module: False)
    assert load_text(folder, tmp_path).tokenizer_hash == first.tokenizer_hash
    again = TextProcessor.load(folder, home=tmp_path)
    assert again.encode(CORPUS[0], True) == first.encode(CORPUS[0], True)
    # Other settings are another tokenizer.
    other = variant(folder, tmp_path / "other", {**LLAMA_2, "add_bos_token": False})
    assert converted_path(other, tmp_path) != path
    with pytest.raises(CheckpointError, match="pip install sentencepiece protobuf") as caught:
        load_text(other, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_broken_sentencepiece_model_is_one_line(model: Path, tmp_path: Path) -> None:
    folder = variant(model, tmp_path / "sp", LLAMA_2)
    (folder / "tokenizer.model").write_bytes(b"\x0e nothing of the kind")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model cannot be converted") as caught:
        load_text(folder, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tokenizers").exists()


def test_another_pipeline_is_another_hash(published: Path, tmp_path: Path) -> None:
    hashes = {
        TextProcessor.load(variant(published, tmp_path / name, settings)).tokenizer_hash
        for name, (settings, _) in list(VARIANTS.items())[2:4]
    }
    assert len(hashes) == 2


def test_settings_that_are_no_object_are_named(published: Path, tmp_path: Path) -> None:
    folder = variant(published, tmp_path / "bad", None)
    (folder / "tokenizer_config.json").write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not a JSON object"):
        TextProcessor.load(folder)


def test_the_packages_are_named_once_each() -> None:
    need("sentencepiece", "google.protobuf")
    assert all(
        sentencepiece_tokenizer._installed(module) for module in sentencepiece_tokenizer._PACKAGES
    )
