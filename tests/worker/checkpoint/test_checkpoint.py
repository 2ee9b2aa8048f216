from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub import errors as hub
from transformers import AutoModelForCausalLM

from nightherd.catalogue import checkpoint_key
from nightherd.errors import CheckpointError
from nightherd.text import TextProcessor
from tests.checkpoints import write_checkpoint
from worker.checkpoint import device, locate, memory
from worker.checkpoint import provenance as provenances
from worker.checkpoint.device import resolve_device, resolve_dtype
from worker.checkpoint.files import Weights, meta_format
from worker.checkpoint.hub.cache import link, snapshot, storage, write_ref
from worker.checkpoint.hub.download import download, wanted_files
from worker.checkpoint.hub.repository import (
    HTTP_ERROR,
    RemoteFile,
    Repository,
    UnreachableError,
    clean,
    explain,
)
from worker.checkpoint.load import load_model
from worker.checkpoint.locate import find
from worker.checkpoint.provenance import provenance, weights_hash
from worker.engine.cpu.compiler import CpuKernels, Failure
from worker.engine.cpu.level import Level


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


COMMIT = "5" * 40


def repository(*names: str, name: str = "org/name") -> Repository:
    files = tuple(RemoteFile(one, 10, "0" * 64) for one in names)
    return Repository(name, "main", COMMIT, files, None, None)


def test_of_a_repository_no_pickles_are_wanted() -> None:
    names = [
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
    assert [file.name for file in wanted_files(repository(*names))] == names[:7]
    assert len(wanted_files(repository(*names), all_files=True)) == len(names)


@pytest.mark.parametrize("name", ["../out.json", "/etc/out.json", "a/../../out.json"])
def test_a_server_does_not_lead_out_of_the_cache(name: str) -> None:
    with pytest.raises(CheckpointError, match="unlikely name"):
        download(repository("model.safetensors", name), all_files=True)
    outside = Repository(
        "org/name", "main", COMMIT, (RemoteFile("model.safetensors", 1, "../x"),), None, None
    )
    with pytest.raises(CheckpointError, match="unlikely name"):
        download(outside)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fill_cache(made: Path) -> Path:
    """The checkpoint as `org/name` in the cache, and its folder there."""
    for path in made.iterdir():
        blob = storage("org/name") / "blobs" / path.name
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link(blob, snapshot("org/name", COMMIT) / path.name)
    write_ref("org/name", "main", COMMIT)
    return snapshot("org/name", COMMIT)


@pytest.mark.parametrize(
    ("error", "warned"),
    [(UnreachableError("the Hub is away"), False), (CheckpointError("no access any more"), True)],
)
def test_what_is_in_the_cache_serves_without_the_hub(
    made: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: CheckpointError,
    warned: bool,
) -> None:
    def refuse(name: str, revision: str) -> Repository:
        raise error

    monkeypatch.setattr(locate, "look_up", refuse)
    with pytest.raises(CheckpointError, match=str(error)):
        find("org/name@main")
    folder = fill_cache(made)
    assert find("org/name@main") == folder
    assert find(f"org/name@{COMMIT}") == folder
    assert ("what is in the cache is used" in caplog.text) == warned
    with pytest.raises(CheckpointError):
        find("org/name@v2")
    # Without its weights it is of no use.
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=str(error)):
        find("org/name@main")


def test_all_of_it_in_the_cache_is_not_fetched(
    made: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill_cache(made)
    known = repository(*(path.name for path in made.iterdir()))
    monkeypatch.setattr(locate, "look_up", lambda name, revision: known)
    assert find("org/name@main") == folder
    # A new commit of the branch, with a file that is not here: that must be fetched.
    newer = repository(*(path.name for path in made.iterdir()), "tokenizer.model")
    monkeypatch.setattr(locate, "look_up", lambda name, revision: newer)
    monkeypatch.setattr(locate, "download", lambda wanted: Path(f"fetched {wanted.name}"))
    assert find("org/name@main") == Path("fetched org/name")


def test_a_disk_that_is_too_small_is_said_before(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = Repository(
        "org/name",
        "main",
        COMMIT,
        (RemoteFile("model.safetensors", 10**18, "0" * 64),),
        None,
        None,
    )
    with pytest.raises(
        CheckpointError, match=r"needs 1000000\.0 TB, and .* are free under"
    ) as caught:
        download(large)
    one_line(caught)


def hub_error(kind: type[hub.HfHubHTTPError], status: int, message: str = "no") -> Exception:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind(message, response=response)


@pytest.mark.parametrize("token", [None, "hf_mine"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(hub.GatedRepoError, 403), "it is gated and .*HF_TOKEN"),
        (hub_error(hub.RepositoryNotFoundError, 404), "no such repository"),
        (hub_error(hub.RevisionNotFoundError, 404), "no revision 'main'"),
        (hub_error(hub.DisabledRepoError, 403), "disabled"),
        (hub_error(hub.HfHubHTTPError, 429), "asks to wait"),
        (hub_error(hub.HfHubHTTPError, 500), "answers 500"),
        (hub_error(hub.HfHubHTTPError, 403, "not for hf_mine"), "may not read it.*not for"),
        (hub.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE is set"),
        (HTTP_ERROR("Connection\nrefused"), r"cannot be reached \(Connection refused\)"),
        (TimeoutError(), "cannot be reached"),
        (OSError(errno.ENOSPC, "No space left\non device"), "no space left under"),
        (ValueError("two\nlines"), "two lines"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str, token: str | None
) -> None:
    monkeypatch.setenv("HF_TOKEN", token or "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(CheckpointError, match=message) as caught:
        raise explain(error, "org/name", "main")
    assert one_line(caught).startswith("checkpoint org/name@main cannot be fetched: ")
    assert "hf_mine" not in str(caught.value)


def test_no_token_is_ever_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-odd-token")
    text = (
        "GET https://me:secret@hub/x?X-Amz-Signature=abc&y with Bearer hf_other: an-odd-token "
        "hf_AbC12"
    )
    said = clean(ValueError(text))
    for secret in ("secret", "abc", "hf_other", "an-odd-token", "hf_AbC12"):
        assert secret not in said
    assert "https://me:***@hub/x" in said


@pytest.mark.parametrize(
    ("label", "names", "said"),
    [
        ("meta-llama/Llama-2-7b@main", (), "use meta-llama/Llama-2-7b-hf, or download"),
        ("meta-llama/Llama-2-70b-chat", (), "use meta-llama/Llama-2-70b-chat-hf"),
        ("meta-llama/Llama-2-7b-hf@main", ("config.json",), None),
        ("org/own", ("consolidated.00.pth", "params.json"), "use org/own-hf"),
        ("/a/7B", ("consolidated.00.pth", "params.json"), "convert /a/7B OUT"),
        ("/a/8B", ("consolidated.00.pth", "config.json", "model.safetensors"), None),
    ],
)
def test_metas_format_is_recognised(label: str, names: tuple[str, ...], said: str | None) -> None:
    found = meta_format(label, names)
    assert (found is None) == (said is None)
    assert said is None or said in str(found)


def test_loads_in_the_precision_asked_for(made: Path) -> None:
    loaded = load_model(made, "cpu", "float32")
    assert (loaded.dtype, loaded.device) == ("float32", torch.device("cpu"))
    assert not loaded.model.training
    assert loaded.vocab_rows == 512
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    half = load_model(made, "cpu", "bf16")
    assert half.dtype == "bfloat16"


def test_the_automatic_precision_is_what_the_cpu_computes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    best: Level
    # The machine, its kernels' level; whether the weights are bfloat16; whether there are kernels.
    for best, level, stored, there, dtype in (
        ("amx", "amx", False, True, torch.bfloat16),
        ("amx", "avx512", False, True, torch.float32),
        ("avx512bf16", "avx512bf16", False, True, torch.bfloat16),
        ("avx512bf16", "avx512bf16", False, False, torch.bfloat16),
        ("avx512bf16", "avx2", False, True, torch.float32),
        ("avx2", "avx2", True, True, torch.bfloat16),
        ("avx2", "avx2", False, True, torch.float32),
        ("avx2", "avx2", True, False, torch.float32),
        ("plain", "plain", True, True, torch.bfloat16),
    ):
        monkeypatch.setattr(device, "x86", lambda: True)
        monkeypatch.setattr(device, "machine_level", lambda best=best: best)
        monkeypatch.setattr(device, "suited_level", lambda best=best: best)
        failure = None if there else Failure("no compiler")
        monkeypatch.setattr(CpuKernels, "failure", lambda self, failure=failure: failure)
        kernels = CpuKernels(tmp_path, cast(Level, level))
        assert resolve_dtype("auto", cpu, bfloat16=stored, kernels=kernels) == dtype
    # Another engine is asked for.
    assert resolve_dtype("auto", cpu, bfloat16=True, kernels=None) == torch.float32
    monkeypatch.setattr(device, "x86", lambda: False)
    for flags, dtype in (({"sve_bf16": True}, torch.bfloat16), ({}, torch.float32)):
        monkeypatch.setattr(device, "_cpu_capabilities", lambda flags=flags: flags)
        assert resolve_dtype("auto", cpu) == dtype
    with pytest.raises(CheckpointError, match="'int3' is unknown"):
        resolve_dtype("int3", cpu)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, True),
        ({"head_dim": None, "hidden_size": 4096, "num_attention_heads": 32}, True),
        ({"model_type": "gemma"}, False),
        ({"hidden_act": "gelu"}, False),
        ({"head_dim": 72}, False),
        ({"head_dim": 512}, False),
        ({"hidden_size": 72}, False),
        ({"sliding_window": 1024}, False),
        ({"sliding_window": 1024, "use_sliding_window": False}, True),
        ({"sliding_window": 4096}, True),
        ({"quantization_config": {"quant_method": "awq"}}, False),
    ],
)
def test_bfloat16_is_kept_for_what_the_kernels_cover(changes: dict[str, Any], kept: bool) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 256,
        "num_attention_heads": 4,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        **changes,
    }
    assert device.keeps_bfloat16(Weights({"BF16": 10}), config) == kept
    assert not device.keeps_bfloat16(Weights({"F32": 10}), config)


def test_weights_are_bfloat16_if_most_of_them_are() -> None:
    assert Weights({"BF16": 100, "F32": 3}).bfloat16
    assert not Weights({"BF16": 3, "F32": 100}).bfloat16
    assert not Weights({}).bfloat16


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


def other_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"no_such": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def quantise(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "hqq"})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncate, r"model\.safetensors is broken \(1,000 of .* bytes are missing\); download or"),
        (garbage, r"model\.safetensors is broken"),
        (only_pickles, "no safetensors files in .*convert"),
        (drop_shard, r"names model-00002\.safetensors, which is not there; download or copy"),
        (other_shard, r"says that no_such is in model-1\.safetensors, which lacks it"),
        (broken_index, r"model\.safetensors\.index\.json cannot be read"),
        (lambda folder: edit_config(folder, model_type="nonsense"), "of type 'nonsense'"),
        (lambda folder: edit_config(folder, model_type="t5"), "no causal .* of type 't5'"),
        (lambda folder: edit_config(folder, num_hidden_layers=5), "its weights lack model.layers"),
        (lambda folder: edit_config(folder, intermediate_size=64), "in another shape"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (quantise, "quantised by hqq, which needs: pip install hqq"),
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
    with pytest.raises(CheckpointError, match="the code that it brings is never run"):
        load_model(folder, "cpu", "float32")


def test_too_little_memory_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", explode)
    with pytest.raises(CheckpointError, match="does not fit into the memory of cpu"):
        load_model(folder, "cpu", "float32")

    # Known before anything is read.
    monkeypatch.setattr(memory, "machine_memory", lambda: (2_000_000, 4_000_000))
    with pytest.raises(
        CheckpointError, match=r"take 2\.3 MB in float32, 2\.0 MB of memory are available on cpu"
    ) as caught:
        load_model(folder, "cpu", "float32")
    one_line(caught)
    with pytest.raises(CheckpointError, match="does not fit into the memory of cpu"):
        load_model(folder, "cpu", "bfloat16")


def test_on_the_way_to_a_card_weights_pass_through_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "machine_memory", lambda: (10**9, 10**10))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (5 * 10**9, 8 * 10**9))
    card, half = torch.device("cuda", 1), torch.bfloat16
    monkeypatch.setattr(device, "loads_straight", lambda place: False)
    assert memory.problem("x", 10**9, {}, half, card) is None
    assert "pip install accelerate" in str(memory.problem("x", 2 * 10**9, {}, half, card))
    assert "memory on their way to cuda:1" in str(memory.problem("x", 2 * 10**9, {}, half, card))
    said = memory.problem("x", 6 * 10**9, {}, half, card)
    assert "take 6.0 GB in bfloat16, 5.0 GB of memory are available on cuda:1" in str(said)


def test_the_hash_of_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights_hash(folder)
    assert whole.startswith("sha256:")
    (folder / "README.md").write_text("x")
    assert weights_hash(folder) == whole

    monkeypatch.setattr(provenances, "HASHED_WHOLE", 1000)
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
    offsets = list(provenances._sample_offsets(size))
    assert offsets[0] == 0
    assert offsets[-1] == size - (64 << 10)
    assert len(set(offsets)) == 256


def test_provenance_of_a_folder_and_of_a_snapshot(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(made, "cpu", "float32")
    text = TextProcessor.load(made)
    key = checkpoint_key(str(made))
    found = provenance(key, text, loaded, "transformers")
    assert found["checkpoint_key"] == key
    assert found["revision"] is None
    assert found["weights_hash"] == weights_hash(made)
    assert (found["dtype"], found["engine"]) == ("float32", "transformers")
    assert found["device"].startswith("cpu")
    assert found["tokenizer_hash"] == text.tokenizer_hash
    assert found["template_hash"] == text.template_hash
    assert set(found["versions"]) == {"nightherd", "torch", "transformers", "tokenizers", "python"}
    json.dumps(found)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = fill_cache(made)
    pinned = provenance("org/name@main", text, load_model(folder, "cpu"), "transformers")
    assert pinned["revision"] == COMMIT
    assert pinned["weights_hash"] is None
