"""`nightherd checkpoint` against a Hub on this machine, and on what lies in folders."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from tests.checkpoints import CHAT_TEMPLATE, tiny_llama, write_checkpoint
from tests.commands.invoking import CommandLine, Outcome, environment
from tests.conftest import wait_until
from tests.fake_hub import COMMIT, FakeHub, FakeRepository, running_hub
from tests.layouts import write_json, write_meta, write_tiktoken
from worker.checkpoint import sentencepiece_tokenizer
from worker.checkpoint.report import check
from worker.commands import checkpoint as command

SECRET = "hf_SecretOfThisTest"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture
def hub(made: Path) -> Iterator[FakeHub]:
    """A Hub with `org/tiny`: the checkpoint, and what nobody wants to download."""
    with running_hub() as running:
        repository = FakeRepository.of(made)
        repository.files |= {"pytorch_model.bin": b"x", "original/params.json": b"{}"}
        running.repositories["org/tiny"] = repository
        yield running


@pytest.fixture
def nightherd(hub: FakeHub, tmp_path: Path) -> CommandLine:
    return CommandLine(hub_environment(hub, tmp_path), tmp_path)


def hub_environment(hub: FakeHub, home: Path, **more: str) -> dict[str, str]:
    kept = {name: one for name, one in environment(home).items() if not name.startswith("HF_")}
    return {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), **more}


def cached(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "hub" / "models--org--tiny"


def fails(outcome: Outcome, *parts: str) -> str:
    """One line on standard error, without a token; returns it."""
    assert outcome.code == 1, outcome
    assert len(outcome.error_lines) == 1, outcome.err
    for part in parts:
        assert part in outcome.err
    assert "Traceback" not in outcome.err
    assert SECRET not in outcome.out + outcome.err
    return outcome.err


# Downloads.


def test_a_download_holds_what_is_needed_and_serves_without_the_hub(
    nightherd: CommandLine, hub: FakeHub, tmp_path: Path
) -> None:
    outcome = nightherd("checkpoint", "download", "org/tiny")
    assert (outcome.code, outcome.err) == (0, "")
    folder = Path(outcome.out.strip())
    assert folder == cached(tmp_path) / "snapshots" / COMMIT
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "generation_config.json", WEIGHTS, "tokenizer.json"),
        "tokenizer_config.json",
    }
    assert (cached(tmp_path) / "refs" / "main").read_text() == COMMIT

    # huggingface_hub itself finds it there.
    found = huggingface_hub.snapshot_download(
        "org/tiny", cache_dir=tmp_path / "hf" / "hub", local_files_only=True
    )
    assert Path(found) == folder

    offline = CommandLine({**nightherd.environment, "HF_HUB_OFFLINE": "1"}, tmp_path)
    before = len(hub.requests)
    outcome = offline("checkpoint", "check", "org/tiny", "--json", "--device", "cpu")
    report = json.loads(outcome.out)
    assert (outcome.code, report["ok"], report["found"]) == (0, True, "cache"), outcome
    assert report["path"] == str(folder)
    assert len(hub.requests) == before

    (row,) = json.loads(nightherd("checkpoint", "list", "--json").out)
    assert (row["name"], row["revisions"], row["commit"]) == ("org/tiny", ["main"], COMMIT)
    assert row["size_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert (row["problem"], row["workers"]) == (None, [])
    assert "org/tiny@main" in nightherd("checkpoint", "list").out


def test_all_files_of_a_revision(nightherd: CommandLine, tmp_path: Path) -> None:
    outcome = nightherd("checkpoint", "download", "org/tiny", "--revision", COMMIT, "--all-files")
    folder = Path(outcome.out.strip())
    assert (folder / "pytorch_model.bin").exists()
    assert (folder / "original" / "params.json").read_text() == "{}"
    assert not (cached(tmp_path) / "refs").exists()


def test_a_connection_that_breaks_off_is_resumed(
    nightherd: CommandLine, hub: FakeHub, made: Path
) -> None:
    hub.repositories["org/tiny"].cut_after[WEIGHTS] = [70_000, 90_000]
    outcome = nightherd("checkpoint", "download", "org/tiny")
    assert (outcome.code, outcome.err) == (0, "")
    assert [one.range for one in hub.fetched(WEIGHTS)] == [None, "bytes=70000-", "bytes=160000-"]
    folder = Path(outcome.out.strip())
    assert (folder / WEIGHTS).read_bytes() == (made / WEIGHTS).read_bytes()


def test_a_download_that_was_killed_goes_on_where_it_stopped(
    nightherd: CommandLine, hub: FakeHub, made: Path, tmp_path: Path
) -> None:
    hub.repositories["org/tiny"].stall_after[WEIGHTS] = 100_000
    process = nightherd.start("checkpoint", "download", "org/tiny", log=tmp_path / "log")
    blobs = cached(tmp_path) / "blobs"
    wait_until(
        lambda: any(path.stat().st_size == 100_000 for path in blobs.glob("*.incomplete")),
        seconds=60,
        what="the first part",
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    outcome = nightherd("checkpoint", "download", "org/tiny")
    assert (outcome.code, outcome.err) == (0, "")
    assert [one.range for one in hub.fetched(WEIGHTS)] == [None, "bytes=100000-"]
    assert (Path(outcome.out.strip()) / WEIGHTS).read_bytes() == (made / WEIGHTS).read_bytes()
    assert not list(blobs.glob("*.incomplete"))


def test_two_at_once_share_one_download(
    nightherd: CommandLine, hub: FakeHub, tmp_path: Path
) -> None:
    """As workers do that start together, one a GPU."""
    hub.repositories["org/tiny"].stall_after[WEIGHTS] = 100_000
    first = nightherd.start("checkpoint", "download", "org/tiny", log=tmp_path / "first")
    wait_until(lambda: bool(hub.fetched(WEIGHTS)), seconds=60, what="the first request")
    second = nightherd.start("checkpoint", "download", "org/tiny", log=tmp_path / "second")
    wait_until(
        lambda: sum(one.path.startswith("api/") for one in hub.requests) == 2,
        seconds=60,
        what="the second's question",
    )
    hub.release.set()
    assert (first.wait(60), second.wait(60)) == (0, 0)
    assert (tmp_path / "first").read_text() == (tmp_path / "second").read_text()
    # The rest after the stall, and nothing for the second.
    assert [one.range for one in hub.fetched(WEIGHTS)] == [None, "bytes=100000-"]


def test_a_wrong_hash_is_deleted_and_named(
    nightherd: CommandLine, hub: FakeHub, tmp_path: Path
) -> None:
    repository = hub.repositories["org/tiny"]
    wrong = bytearray(repository.files[WEIGHTS])
    wrong[-1] ^= 1
    repository.altered[WEIGHTS] = bytes(wrong)
    digest = hashlib.sha256(repository.files[WEIGHTS]).hexdigest()
    outcome = nightherd("checkpoint", "download", "org/tiny")
    fails(outcome, WEIGHTS, "arrived damaged", digest, "deleted", "run the command again")
    assert not list((cached(tmp_path) / "blobs").glob(f"{digest}*"))
    assert not (cached(tmp_path) / "snapshots" / COMMIT / WEIGHTS).exists()
    assert not (cached(tmp_path) / "refs").exists()

    # And one that rots in the cache is found and fetched anew.
    repository.altered.clear()
    folder = Path(nightherd("checkpoint", "download", "org/tiny").out.strip())
    (folder / WEIGHTS).resolve().write_bytes(bytes(wrong))
    outcome = nightherd("checkpoint", "download", "org/tiny")
    assert outcome.code == 0
    assert outcome.err == f"{WEIGHTS} in the cache was damaged; it is deleted and fetched again\n"
    assert (folder / WEIGHTS).read_bytes() == repository.files[WEIGHTS]


# What the Hub refuses.


def gated(hub: FakeHub) -> None:
    hub.repositories["org/tiny"].gated = "manual"
    hub.repositories["org/tiny"].counted = {"BF16": 574_336}


def nothing(hub: FakeHub) -> None:
    hub.repositories.clear()


def failing(hub: FakeHub) -> None:
    hub.repositories["org/tiny"].status = 503


def refusing_token(hub: FakeHub) -> None:
    hub.repositories["org/tiny"].status = 401


def forbidding(hub: FakeHub) -> None:
    hub.repositories["org/tiny"].status = 403


REFUSALS: list[tuple[str, Callable[[FakeHub], None], Mapping[str, str], tuple[str, ...]]] = [
    ("401, gated", gated, {},
     ("is gated", "no token was sent", "request access on http://", "/org/tiny", "approval",
      "hf auth login", "HF_TOKEN")),
    ("403, gated", gated, {"HF_TOKEN": SECRET},
     ("is gated", "the account of this token has no access", "approval", "Settings")),
    ("404", nothing, {"HF_TOKEN": SECRET}, ("no such repository", "check the name")),
    ("401, nothing", nothing, {}, ("no such repository", "HF_TOKEN")),
    ("401, the token", refusing_token, {"HF_TOKEN": SECRET}, ("refuses the token", "expired")),
    ("403, the token", forbidding, {"HF_TOKEN": SECRET}, ("the token may not read it",)),
    ("503", failing, {}, ("answers 503", "try later")),
    ("offline", gated, {"HF_HUB_OFFLINE": "1"}, ("HF_HUB_OFFLINE is set", "not in the local")),
    ("unreachable", gated, {"HF_ENDPOINT": f"http://me:{SECRET}@127.0.0.1:9"},
     ("cannot be reached", "not in the local cache", "HF_ENDPOINT")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "variables", "parts"),
    [case[1:] for case in REFUSALS],
    ids=[case[0] for case in REFUSALS],
)
def test_what_the_hub_refuses_is_one_line(
    hub: FakeHub,
    tmp_path: Path,
    change: Callable[[FakeHub], None],
    variables: Mapping[str, str],
    parts: tuple[str, ...],
) -> None:
    change(hub)
    run = CommandLine(hub_environment(hub, tmp_path, **variables), tmp_path)
    fails(run("checkpoint", "check", "org/tiny"), "org/tiny@main", *parts)


def test_a_gated_checkpoint_with_access(hub: FakeHub, tmp_path: Path) -> None:
    gated(hub)
    hub.repositories["org/tiny"].tokens = (SECRET,)
    run = CommandLine(hub_environment(hub, tmp_path, HF_TOKEN=SECRET), tmp_path)
    outcome = run("checkpoint", "check", "org/tiny", "--device", "cpu", "--dtype", "float32")
    assert (outcome.code, outcome.err) == (0, "")
    for part in ("not downloaded yet", "yes, access is granted by its owners", "574,336", "256"):
        assert part in outcome.out
    assert SECRET not in outcome.out
    # Nothing was downloaded: neither weights nor their headers, the Hub itself had counted.
    assert not hub.fetched(WEIGHTS)
    assert not cached(tmp_path).exists()


def test_names_that_lead_to_no_weights(
    nightherd: CommandLine, hub: FakeHub, tmp_path: Path
) -> None:
    outcome = nightherd("checkpoint", "check", "org/tiny", "--revision", "v9")
    fails(outcome, "has no revision 'v9'")
    outcome = nightherd("checkpoint", "check", "meta-llama/Llama-2-7b-chat")
    fails(outcome, "Meta's original format", "use meta-llama/Llama-2-7b-chat-hf",
          "nightherd checkpoint convert DIR OUT")  # fmt: skip
    repository = hub.repositories["org/tiny"]
    del repository.files[WEIGHTS]
    outcome = nightherd("checkpoint", "download", "org/tiny")
    fails(outcome, "no safetensors files in org/tiny@main", "pickles can carry code")
    repository.files = {"consolidated.00.pth": b"x", "params.json": b"{}", "tokenizer.model": b""}
    fails(nightherd("checkpoint", "download", "org/tiny"), "use org/tiny-hf", "--all-files")
    assert nightherd("checkpoint", "download", "org/tiny", "--all-files").code == 0
    outcome = nightherd("checkpoint", "download", "demo")
    assert outcome.code == 2
    assert "nothing to download" in outcome.err


def test_a_tokenizer_to_be_converted_without_the_packages(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything large is fetched."""
    files = hub.repositories["org/tiny"].files
    files["tokenizer.model"] = files.pop("tokenizer.json")
    monkeypatch.setattr(sentencepiece_tokenizer, "_installed", lambda module: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    report = check("org/tiny@main", home=tmp_path)
    (problem,) = report.problems
    assert problem.startswith("the tokenizer of org/tiny@main is sentencepiece's tokenizer.model")
    assert problem.endswith("pip install sentencepiece protobuf")
    assert report.tokenizer == "tokenizer.model"
    assert list(tmp_path.iterdir()) == []


# What is wrong in a folder.


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    write_json(path, {**json.loads(path.read_text()), **changes})


def truncate(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate((folder / WEIGHTS).stat().st_size - 1000)


def huge(folder: Path) -> None:
    """A header that promises 4 TB, on a file that is as long and holds nothing."""
    length = 4 << 40
    entry = {"dtype": "BF16", "shape": [length // 2], "data_offsets": [0, length]}
    header = json.dumps({"lm_head.weight": entry}).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + length)


def meta(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "consolidated.00.pth").touch()
    (folder / "params.json").touch()


FAULTS: list[tuple[str, Callable[[Path], object], tuple[str, ...]]] = [
    ("nothing there", shutil.rmtree, ("no such folder",)),
    ("no config", lambda folder: (folder / "config.json").unlink(), ("it has no config.json",)),
    ("no safetensors", lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
     ("no safetensors files", "nightherd checkpoint convert DIR OUT")),
    ("Meta's format", meta, ("Meta's original format", "-hf", "nightherd checkpoint convert")),
    ("a broken file", truncate, (WEIGHTS, "is broken (1,000 of", "bytes are missing", "again")),
    ("a pointer", lambda folder: (folder / WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\n"), ("pointer of Git LFS", "git lfs pull")),
    ("broken JSON", lambda folder: (folder / "config.json").write_text('{"model_type": '),
     ("config.json cannot be read", "download or copy it again")),
    ("a broken tokenizer", lambda folder: (folder / "tokenizer.json").write_text("{"),
     ("tokenizer.json cannot be read", "download or copy it again")),
    ("no tokenizer", lambda folder: (folder / "tokenizer.json").unlink(), ("no tokenizer.json",)),
    ("an unknown architecture", lambda folder: edit(folder, "config.json", model_type="llama9"),
     ("transformers", "no causal language model of type 'llama9'", "pip install -U transformers")),
    ("a quantisation", lambda folder: edit(folder, "config.json", quantization_config={
        "quant_method": "compressed-tensors"}), ("pip install compressed-tensors",)),
    ("too large", huge, ("its weights take 4.4 TB in bfloat16", "available on cpu", "--dtype")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("harm", "parts"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS]
)
def test_a_fault_in_a_folder_is_one_line(
    made: Path, tmp_path: Path, harm: Callable[[Path], object], parts: tuple[str, ...]
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    harm(folder)
    run = CommandLine(environment(tmp_path), tmp_path)
    outcome = run("checkpoint", "check", str(folder), "--device", "cpu", "--dtype", "bfloat16")
    fails(outcome, *parts)


def test_more_sequences_than_fit(made: Path, tmp_path: Path) -> None:
    run = CommandLine(environment(tmp_path), tmp_path)
    outcome = run(
        *("checkpoint", "check", made, "--device", "cpu", "--dtype", "float32", "--json"),
        *("--sequences", "1000000000"),
    )
    fails(outcome, "1,000,000,000 sequences of 256 tokens do not fit", "ask for fewer")
    report = json.loads(outcome.out)
    assert report["ok"] is False
    # Keys and values × 3 layers × 2 KV heads × 32 × 4 bytes.
    assert report["memory"]["kv_bytes_per_token"] == 2 * 3 * 2 * 32 * 4
    assert report["memory"]["weights_bytes"] == 4 * report["parameters"]
    assert report["memory"]["fits"] is False


@pytest.mark.parametrize(
    ("harm", "options", "parts"),
    [
        (truncate, [], ("is broken", "download or copy it again")),
        (lambda folder: None, ["--device", "cuda:77"], ("'cuda:77'",)),
    ],
    ids=["a broken file", "no such device"],
)
def test_a_worker_says_it_and_exits_at_once(
    made: Path,
    tmp_path: Path,
    harm: Callable[[Path], object],
    options: list[str],
    parts: tuple[str, ...],
) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    harm(folder)
    run = CommandLine(environment(tmp_path, log_level="ERROR"), tmp_path)
    fails(run("worker", "--checkpoint", folder, *options, seconds=100), *parts)
    assert json.loads(run("workers", "--json").out) == []


def test_a_worker_without_access_to_its_checkpoint(hub: FakeHub, tmp_path: Path) -> None:
    gated(hub)
    variables = {"HF_TOKEN": SECRET, "NIGHTHERD_LOG_LEVEL": "ERROR"}
    run = CommandLine(hub_environment(hub, tmp_path, **variables), tmp_path)
    fails(run("worker", "--checkpoint", "org/tiny", seconds=100), "is gated", "has no access")


# Listing.


def test_the_list_says_who_holds_what(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = tmp_path / "models--org--tiny"
    shutil.copytree(made, storage / "snapshots" / COMMIT)
    shutil.copytree(made, storage / "snapshots" / ("b" * 40))
    (storage / "snapshots" / ("b" * 40) / WEIGHTS).unlink()
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    workers = [
        SimpleNamespace(id="w1", checkpoint="org/tiny@main", serves=["org/tiny@main"]),
        SimpleNamespace(id="w2", checkpoint="/weights", serves=["/weights", f"org/tiny@{COMMIT}"]),
        SimpleNamespace(id="w3", checkpoint="demo", serves=["demo"]),
    ]
    monkeypatch.setattr(command, "_live_workers", lambda: workers)
    rows = json.loads(CliRunner().invoke(command.checkpoint, ["list", "--json"]).output)
    assert [(row["name"], row["workers"]) for row in rows] == [
        ("org/tiny", []),
        ("org/tiny", ["w1", "w2"]),
        ("demo", ["w3"]),
    ]
    assert "no safetensors" in rows[0]["problem"]
    lines = CliRunner().invoke(command.checkpoint, ["list"]).output.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["org/tiny", "org/tiny@main", "demo"]
    assert ["incomplete" in line for line in lines[1:]] == [True, False, False]
    assert lines[2].endswith("w1, w2")


# Converting.


def test_metas_format_is_converted(tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=320 + 256, rms_norm_eps=1e-5)
    folder = tmp_path / "Llama-3-8B-Instruct"
    write_meta(folder, model, embedding_dim=0, n_kv_heads=2, rope_theta=500000.0)
    write_tiktoken(folder)
    run = CommandLine(environment(tmp_path), tmp_path)
    outcome = run("checkpoint", "convert", folder.name, "made")
    assert (outcome.code, outcome.out, outcome.err) == (0, "made\n", "")
    report = json.loads(
        run("checkpoint", "check", "made", "--json", "--device", "cpu", "--dtype", "float32").out
    )
    assert report["ok"] is True, report
    assert (report["context_length"], report["vocab_size"]) == (8192, 576)
    assert report["chat_template"] is True
    outcome = run("checkpoint", "convert", folder.name, "made")
    assert outcome.code == 2
    assert outcome.error_lines == ["nightherd: made exists; give the name of a new folder"]
    assert CHAT_TEMPLATE not in (tmp_path / "made" / "tokenizer_config.json").read_text()
