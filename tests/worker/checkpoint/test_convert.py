"""Meta's original format, and torch's pickles, become checkpoints with the same logits."""

from __future__ import annotations

import json
import pickle
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import torch

from nightherd.errors import CheckpointError, UsageError
from nightherd.text import TextProcessor
from tests.checkpoints import CORPUS, tiny_llama, write_checkpoint
from tests.layouts import merged, write_json, write_meta, write_sentencepiece, write_tiktoken
from worker.checkpoint.files import INDEX, SINGLE
from worker.checkpoint.load import load_model, load_text
from worker.checkpoint.meta import convert as module
from worker.checkpoint.meta.convert import convert
from worker.checkpoint.meta.original import Params, context_length

TOKENS = torch.tensor([[1, *range(3, 60)]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS).logits
    return result


def read(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


@pytest.mark.parametrize("files", [1, 2, 4])
def test_llama_2_comes_back_the_same(
    tmp_path: Path, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With grouped heads, from as many files as there were GPUs, to several files."""
    monkeypatch.setattr(module, "SHARD_BYTES", 500_000)
    model = tiny_llama(num_key_value_heads=4, rms_norm_eps=1e-5)
    write_meta(tmp_path / "7B-chat", model, files=files)
    write_sentencepiece(tmp_path)
    made = convert(tmp_path / "7B-chat", tmp_path / "made").path
    assert (made / INDEX).exists()
    assert not (made / SINGLE).exists()
    assert torch.equal(logits(load_model(made, "cpu", "float32").model), logits(model))
    assert not list(tmp_path.glob(".made*"))
    config = read(made / "config.json")
    assert config["max_position_embeddings"] == 4096
    assert config["torch_dtype"] == "float32"
    text = load_text(made, tmp_path)
    assert text.encode("the ship", True)[0] == text.bos_token_id == 1
    assert text.eos_token_ids == {2}
    # The folder's name says that it is a chat model.
    assert text.generation_layer == {"temperature": 0.6, "top_p": 0.9}
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " Hello "},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "A story."},
    ]
    assert text.render_chat(chat) == (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHello [/INST] Hi! </s><s>[INST] A story. [/INST]"
    )


def test_grouped_heads_and_half_precision_are_kept(tmp_path: Path) -> None:
    model = tiny_llama(num_key_value_heads=2, rms_norm_eps=1e-5)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    write_meta(tmp_path / "70B", model, files=2, dtype=torch.bfloat16, n_kv_heads=2)
    write_sentencepiece(tmp_path / "70B")
    made = convert(tmp_path / "70B", tmp_path / "made", context=512).path
    assert torch.equal(logits(load_model(made, "cpu", "float32").model), logits(model))
    assert read(made / "config.json")["torch_dtype"] == "bfloat16"
    assert read(made / "config.json")["max_position_embeddings"] == 512
    assert not load_text(made, tmp_path).has_chat_template


def llama_3(tied: bool = False) -> Any:
    model = tiny_llama(
        vocab_size=320 + 256,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    if tied:
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone())
    return model


@pytest.mark.parametrize(("files", "tied"), [(1, True), (2, False)])
def test_llama_3_comes_back_the_same(tmp_path: Path, files: int, tied: bool) -> None:
    """Rows of the embedding cut, waves stretched, and the output layer tied where it is equal."""
    model = llama_3(tied)
    folder = tmp_path / "Llama-3.2-Instruct" / "original"
    params = {"n_kv_heads": 2, "rope_theta": 500000.0, "use_scaled_rope": True}
    write_meta(folder, model, files=files, embedding_dim=0, **params)
    ranks = write_tiktoken(folder)
    made = convert(folder, tmp_path / "made", chat=True).path
    assert torch.equal(logits(load_model(made, "cpu", "float32").model), logits(model))
    config = read(made / "config.json")
    assert config["tie_word_embeddings"] is tied
    assert config["max_position_embeddings"] == 131072
    text = TextProcessor.load(made)
    assert text.vocab_size == 576
    assert text.bos_token_id == len(ranks)
    names = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    assert text.eos_token_ids == {text.tokenizer.token_to_id(name) for name in names}
    assert text.render_chat([{"role": "user", "content": " Hello "}]) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    for line in [*CORPUS, "it's 12345 o'clock,  is it?\n\n\tYES!  ", "한국어 🎉"]:
        ids = text.encode(line, True)
        assert ids == [len(ranks), *by_ranks(line, ranks)]
        assert text.decode(ids) == line


def by_ranks(line: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm, slowly: in each word the pair of lowest rank is joined first."""
    words = regex.findall(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        line,
    )
    ids = []
    for word in words:
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            pairs = {left + right for left, right in pairwise(parts)}
            known = [pair for pair in pairs if pair in ranks]
            if not known:
                break
            # All joins of that pair at once are the same as one by one, from the left.
            parts = merged(parts, min(known, key=ranks.__getitem__))
        ids += [ranks[part] for part in parts]
    return ids


@pytest.mark.parametrize(
    ("folder", "chat"),
    [
        ("/w/Llama-2-7b-chat", True),
        ("/w/chat/Llama-2-7b", False),
        ("/w/Meta-Llama-3-8B-Instruct/original", True),
        ("/hub/models--meta-llama--Llama-2-7b-chat/snapshots/c0ffee", True),
        ("/hub/models--meta-llama--Meta-Llama-3-8B/snapshots/c0ffee/original", False),
    ],
)
def test_a_chat_model_is_known_by_its_name(folder: str, chat: bool) -> None:
    assert (module._CHAT.search(module._name_of(Path(folder))) is not None) == chat


@pytest.mark.parametrize(
    ("said", "tiktoken", "length"),
    [
        ({"norm_eps": 1e-6}, False, 2048),  # LLaMA 7B, 13B, 30B
        ({"norm_eps": 1e-5, "dim": 8192, "n_heads": 64}, False, 2048),  # LLaMA 65B
        ({"norm_eps": 1e-5}, False, 4096),  # Llama 2 7B
        ({"norm_eps": 1e-5, "dim": 8192, "n_heads": 64, "n_kv_heads": 8}, False, 4096),
        ({"norm_eps": 1e-5, "rope_theta": 1e6}, False, 16384),  # Code Llama
        ({"norm_eps": 1e-5, "rope_theta": 5e5}, True, 8192),  # Llama 3
        ({"norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}, True, 131072),
    ],
)
def test_the_context_of_each_generation(
    tmp_path: Path, said: dict[str, Any], tiktoken: bool, length: int
) -> None:
    write_json(tmp_path / "params.json", {"dim": 4096, "n_layers": 2, "n_heads": 32, **said})
    assert context_length(Params.read(tmp_path), tiktoken) == length


def test_pickles_of_transformers_become_safetensors(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source")
    model = load_model(source, "cpu", "bfloat16").model
    old = tmp_path / "old"
    shutil.copytree(source, old, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {**model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save(tensors, old / "pytorch_model.bin")
    made = convert(old, tmp_path / "made").path
    assert torch.equal(logits(load_model(made, "cpu", "bfloat16").model), logits(model))
    assert TextProcessor.load(made).tokenizer_hash == TextProcessor.load(source).tokenizer_hash
    assert not (made / "pytorch_model.bin").exists()


class _Command:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    folder = tmp_path / "7B"
    write_meta(folder, tiny_llama(num_key_value_heads=4), files=2)
    (folder / "tokenizer.model").write_bytes(b"not looked into")
    return folder


def replace(path: Path, content: Any) -> None:
    path.unlink()
    if content is not None:
        torch.save(content, path)


def test_what_cannot_be_converted_is_one_line(
    meta: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = sorted(meta.glob("*.pth"))
    good = torch.load(second, weights_only=True)

    def refused(match: str, target: str = "made") -> None:
        with pytest.raises((CheckpointError, UsageError), match=match) as caught:
            convert(meta, tmp_path / target)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob(".made*"))

    refused("7B exists; give the name of a new folder", target="7B")
    second.rename(tmp_path / "away")
    refused("says .*a file is missing")
    (tmp_path / "away").rename(second)
    first.rename(tmp_path / "away")
    refused(r"lacks consolidated\.00\.pth")
    (tmp_path / "away").rename(first)
    replace(second, {**good, "vision_model.weight": torch.ones(1)})
    refused("holds vision_model.weight, which a LLaMA for text does not have")
    replace(second, {name: one for name, one in good.items() if name != "norm.weight"})
    refused(r"file 1 of 2 lacks norm\.weight")
    replace(second, {name: one.to(torch.int8) for name, one in good.items()})
    refused("is quantised in a format of its own")
    second.write_bytes(second.read_bytes()[:-500])
    refused(r"consolidated\.01\.pth cannot be read")
    second.write_bytes(pickle.dumps(_Command()))
    refused(r"consolidated\.01\.pth")
    assert "ran" not in capfd.readouterr().out
    replace(second, good)
    (meta / "tokenizer.model").unlink()
    refused(r"no tokenizer\.model in .* nor in the folder above")
    (meta / "params.json").write_text("{}")
    refused(r"params\.json is not that of a LLaMA")
    (meta / "params.json").unlink()
    refused("nothing to convert")
