from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub

from nightherd.catalogue import checkpoint_key
from nightherd.errors import CheckpointError
from nightherd.text import TextProcessor
from tests.checkpoints import write_checkpoint
from worker import checkpoint
from worker.checkpoint import (
    find,
    load_model,
    provenance,
    resolve_device,
    resolve_dtype,
    weights_hash,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def one_line(caught: pytest.ExceptionInfo[CheckpointError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


def test_a_folder_is_found_by_its_key(made: Path, tmp_path: Path) -> None:
    assert find(checkpoint_key(str(made))) == made.resolve()
    with pytest.raises(CheckpointError, match="no such folder"):
        find(str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        find(str(tmp_path))


def fake_hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def snapshot_download(repository: str, **given: Any) -> str:
        calls.append({"repository": repository, **given})
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_name_on_the_hub_is_downloaded_without_pickles(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_hub(monkeypatch, made)
    assert find("org/name@v2") == made
    (call,) = calls
    assert (call["repository"], call["revision"]) == ("org/name", "v2")
    files = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "config.json",
        "pytorch_model.bin",
        "original/consolidated.00.pth",
        "original/params.json",
        "consolidated.safetensors",
        "training_args.bin",
        "modeling_other.py",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        files,
        allow_patterns=call["allow_patterns"],
        ignore_patterns=call["ignore_patterns"],
    )
    assert list(kept) == files[:7]


def hub_error(kind: type[hub.HfHubHTTPError]) -> Exception:
    response: Any = SimpleNamespace(headers={}, request=None)
    return kind("no", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(hub.GatedRepoError), "it is gated; .*HF_TOKEN"),
        (hub_error(hub.RepositoryNotFoundError), "no such repository"),
        (hub_error(hub.RevisionNotFoundError), "no such revision"),
        (hub.LocalEntryNotFoundError("x"), "cannot be reached"),
        (hub.OfflineModeIsEnabled("x"), "cannot be reached"),
        (OSError(28, "No space left\non device"), "No space left on device"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    fake_hub(monkeypatch, error)
    with pytest.raises(CheckpointError, match=message) as caught:
        find("org/name@main")
    assert one_line(caught).startswith("checkpoint org/name@main cannot be fetched: ")


def test_loads_in_the_precision_asked_for(made: Path) -> None:
    loaded = load_model(made, "cpu", "float32")
    assert (loaded.dtype, loaded.device) == ("float32", torch.device("cpu"))
    assert not loaded.model.training
    assert loaded.vocab_rows == 512
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    half = load_model(made, "cpu", "bf16")
    assert half.dtype == "bfloat16"


def test_the_automatic_precision_is_what_the_cpu_computes_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    for flags, dtype in (({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32)):
        monkeypatch.setattr(checkpoint, "_cpu_capabilities", lambda flags=flags: flags)
        assert resolve_dtype("auto", cpu) == dtype
    with pytest.raises(CheckpointError, match="'int3' is unknown"):
        resolve_dtype("int3", cpu)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    for name in ("tpu", "meta", "cuda:x", "", "mps"):
        with pytest.raises(CheckpointError, match="is unknown: give auto, cpu or cuda:N"):
            resolve_device(name)
    with pytest.raises(CheckpointError, match="no CUDA device"):
        resolve_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(CheckpointError, match="'cuda:2' does not exist: this machine has 2"):
        resolve_device("cuda:2")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def drop_shard(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001.safetensors")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, "cannot be loaded"),
        (garbage, "cannot be loaded"),
        (only_pickles, "no safetensors files in .*convert"),
        (drop_shard, r"model-00002\.safetensors"),
        (lambda folder: edit_config(folder, model_type="nonsense"), "of type 'nonsense'"),
        (lambda folder: edit_config(folder, model_type="t5"), "no causal .* of type 't5'"),
        (lambda folder: edit_config(folder, num_hidden_layers=5), "its weights lack model.layers"),
        (lambda folder: edit_config(folder, intermediate_size=64), "in another shape"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(folder: Path, harm: Any, message: str) -> None:
    harm(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder, "cpu", "float32")
    one_line(caught)


def test_code_in_a_checkpoint_is_not_run(folder: Path) -> None:
    edit_config(
        folder, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    )
    (folder / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(folder, "cpu", "float32")


def test_too_little_memory_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(checkpoint.AutoModelForCausalLM, "from_pretrained", explode)
    with pytest.raises(CheckpointError, match="does not fit into the memory of cpu"):
        load_model(folder, "cpu", "float32")


def test_the_hash_of_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights_hash(folder)
    assert whole.startswith("sha256:")
    (folder / "README.md").write_text("x")
    assert weights_hash(folder) == whole

    monkeypatch.setattr(checkpoint, "HASHED_WHOLE", 1000)
    sampled = weights_hash(folder)
    assert sampled.startswith("sha256-sampled:")
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    assert weights_hash(folder) != sampled
    monkeypatch.undo()
    assert weights_hash(folder) != whole


def test_samples_of_a_large_file_reach_from_its_start_to_its_end() -> None:
    size = 10 << 30
    offsets = list(checkpoint._sample_offsets(size))
    assert offsets[0] == 0
    assert offsets[-1] == size - (64 << 10)
    assert len(set(offsets)) == 256


def test_provenance_of_a_folder_and_of_a_snapshot(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(made, "cpu", "float32")
    text = TextProcessor.load(made)
    key = checkpoint_key(str(made))
    found = provenance(key, text, loaded, "generate")
    assert found["checkpoint_key"] == key
    assert found["revision"] is None
    assert found["weights_hash"] == weights_hash(made)
    assert (found["dtype"], found["engine"]) == ("float32", "generate")
    assert found["device"].startswith("cpu")
    assert found["tokenizer_hash"] == text.tokenizer_hash
    assert found["template_hash"] == text.template_hash
    assert set(found["versions"]) == {"nightherd", "torch", "transformers", "tokenizers", "python"}
    json.dumps(found)

    snapshot = tmp_path / "models--org--name" / "snapshots" / ("5" * 40)
    shutil.copytree(made, snapshot)
    fake_hub(monkeypatch, snapshot)
    pinned = provenance("org/name@main", text, load_model(find("org/name@main"), "cpu"), "generate")
    assert pinned["revision"] == "5" * 40
    assert pinned["weights_hash"] is None
