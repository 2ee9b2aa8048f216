"""The shipped `demo` checkpoint, through plain transformers: what any other engine must agree with.

The weights and the texts were made by `scripts/train_demo.py` and `scripts/stories.py`.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "nightherd" / "checkpoints" / "demo"
PROMPTS = ROOT / "examples" / "prompts.jsonl"
SENTENCE_END = re.compile(r"[.!?]\"?$")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model() -> Any:
    loaded: Any = AutoModelForCausalLM.from_pretrained(DEMO)
    return loaded.eval()


@pytest.fixture(scope="module")
def stories() -> ModuleType:
    """The story grammar, which is a script and not in any package."""
    spec = importlib.util.spec_from_file_location("stories", ROOT / "scripts" / "stories.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def answer(model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> tuple[str, int]:
    """(the greedy answer to a chat, its last token id)."""
    given = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**given, max_new_tokens=250, do_sample=False)
    new = ids[0, given["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), int(new[-1])


def test_it_is_small_and_stored_in_bfloat16(model: Any) -> None:
    assert model.num_parameters() <= 6_000_000
    with (DEMO / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert model.dtype == torch.bfloat16


def test_its_shape_suits_every_attention_kernel(model: Any) -> None:
    config = model.config
    assert config.head_dim == 64
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.vocab_size % 64 == 0
    assert config.max_position_embeddings == 2048
    assert config.tie_word_embeddings


def test_no_file_holds_a_path_of_the_machine_that_made_it() -> None:
    for path in DEMO.iterdir():
        if path.suffix in {".json", ".jinja", ".md"}:
            text = path.read_text()
            assert "name_or_path" not in text, path.name
            paths = re.findall(r"(?<![\w.:/])/\w+/\w.*", text)
            assert not paths, f"{paths} in {path.name}"


def test_its_ends_and_its_padding(model: Any, tokenizer: Any) -> None:
    ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
        assert config.eos_token_id == ends
        assert config.pad_token_id == tokenizer.pad_token_id
        assert config.pad_token_id not in ends
    settings = json.loads((DEMO / "generation_config.json").read_text())
    assert not {"temperature", "top_p", "top_k", "max_length", "do_sample"} & settings.keys()


def test_a_prompt_begins_with_one_bos(tokenizer: Any) -> None:
    bos = tokenizer.bos_token_id
    assert tokenizer("Once upon a time").input_ids.count(bos) == 1
    chat = [{"role": "user", "content": "Tell me a story."}]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert rendered == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nTell me a story.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    assert ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids[0] == bos
    assert ids.count(bos) == 1


@pytest.mark.parametrize(
    "text", ["naïve café", "日本語 🦊", "a\x00b\tc\n\n d", "1234567890", " x "]
)
def test_any_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_once_upon_a_time_becomes_a_story(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    told = model.generate(ids, max_length=200)[0]
    assert len(told) >= 40
    assert int(told[-1]) in model.config.eos_token_id
    text = tokenizer.decode(told, skip_special_tokens=True)
    assert text.startswith("Once upon a time")
    assert SENTENCE_END.search(text), text


def test_max_length_cuts_the_story_off(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    told = model.generate(ids, max_length=50, num_return_sequences=1)
    assert told.shape == (1, 50)


@pytest.mark.parametrize(
    ("wish", "word"),
    [
        ("Tell me a story.", ""),
        ("Tell me a story about a fox.", "fox"),
        ("Tell me a story about a dragon.", "dragon"),
        ("Tell me a bedtime story about an owl.", "owl"),
        ("Tell me a story about a lighthouse.", "lighthouse"),
        ("Tell me a story about a lost key.", "key"),
        ("What is 17 plus 25?", ""),
    ],
)
def test_a_chat_gets_a_story(model: Any, tokenizer: Any, wish: str, word: str) -> None:
    text, last = answer(model, tokenizer, [{"role": "user", "content": wish}])
    assert last == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert len(text.split()) >= 40
    assert SENTENCE_END.search(text), text
    assert re.search(rf"{word}\b", text), text


def test_sampled_stories_differ(model: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    told = model.generate(
        ids, max_length=200, do_sample=True, temperature=1.0, top_k=0, num_return_sequences=4
    )
    texts = tokenizer.batch_decode(told, skip_special_tokens=True)
    assert len(set(texts)) == 4
    assert all(SENTENCE_END.search(text) for text in texts), texts


def test_the_example_prompts_are_valid(tokenizer: Any) -> None:
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    names = [row["custom_id"] for row in rows if "custom_id" in row]
    assert len(rows) == 40
    assert len(set(names)) == len(names) > 0
    for row in rows:
        assert row.keys() - {"custom_id"} in ({"prompt"}, {"messages"})
        if "messages" in row:
            assert tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True)


def test_the_story_grammar_is_deterministic(stories: ModuleType) -> None:
    def told(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [stories.tell(rng).text for _ in range(50)]

    assert told(1) == told(1)
    assert told(1) != told(2)
    assert len(set(told(1))) == 50


@pytest.mark.parametrize("about", ["fox", "a brave bear", "a lost key", "the lighthouse", "teapot"])
def test_the_story_grammar_keeps_to_its_topic(stories: ModuleType, about: str) -> None:
    rng = random.Random(0)
    for _ in range(20):
        assert about.split()[-1] in stories.tell(rng, about).text


def test_the_story_grammar_fills_every_word_in(stories: ModuleType) -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = stories.tell(rng).text
        assert not re.search(r"[{}\[\]|]|  ", text), text
        assert SENTENCE_END.search(text), text
