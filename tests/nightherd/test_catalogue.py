from __future__ import annotations

from pathlib import Path

import pytest

from nightherd.catalogue import (
    DEMO_PATH,
    cached_folder,
    checkpoint_key,
    hub_cache,
    hub_name,
    local_folder,
)
from nightherd.errors import CheckpointError


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_demo_is_the_folder_in_the_package(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert checkpoint_key("demo") == "demo"
    assert local_folder("demo") == DEMO_PATH
    assert checkpoint_key("./demo") == str(tmp_path.resolve() / "demo")


@pytest.mark.parametrize("name", ["llama", "./llama", "~/llama", "weights/7b", "weights/7b/"])
def test_a_folder_becomes_its_absolute_path(name: str, tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "weights" / "7b").mkdir(parents=True)
    key = checkpoint_key(name)
    assert Path(key).is_absolute()
    assert Path(key).name in ("llama", "7b")
    assert local_folder(key) == Path(key)
    assert checkpoint_key(key) == key


def test_a_symbolic_link_is_the_folder_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "latest").symlink_to("real")
    assert checkpoint_key("latest") == checkpoint_key("real")


@pytest.mark.parametrize(
    ("name", "revision", "key"),
    [
        ("meta-llama/Llama-3.2-1B", None, "meta-llama/Llama-3.2-1B@main"),
        ("meta-llama/Llama-3.2-1B", "v2", "meta-llama/Llama-3.2-1B@v2"),
        ("meta-llama/Llama-3.2-1B@refs/pr/3", None, "meta-llama/Llama-3.2-1B@refs/pr/3"),
        ("meta-llama/Llama-3.2-1B@v2", "v2", "meta-llama/Llama-3.2-1B@v2"),
    ],
)
def test_a_name_on_the_hub_carries_its_revision(name: str, revision: str | None, key: str) -> None:
    assert checkpoint_key(name, revision) == key
    assert checkpoint_key(key) == key
    assert local_folder(key) is None
    assert hub_name(key) == tuple(key.split("@"))


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("./missing", None, "no such folder"),
        ("/missing", None, "no checkpoint at /missing: no such folder"),
        ("~/missing", None, "no such folder"),
        ("~nobody-of-this-name/x", None, "no such home folder"),
        ("./file", None, "not a folder"),
        ("llama", None, "give demo, the path of a folder, or the name"),
        ("a/b/c", None, "give demo"),
        ("", None, "give demo"),
        ("demo", "v2", "has no revision"),
        ("./folder", "v2", "has no revision"),
        ("org/name@v1", "v2", "two revisions"),
    ],
)
def test_what_names_no_checkpoint(
    name: str, revision: str | None, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=message):
        checkpoint_key(name, revision)


def test_where_the_hub_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert hub_cache() == Path.home() / ".cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert hub_cache() == Path("/cache/huggingface/hub")
    monkeypatch.setenv("HF_HOME", "/hf")
    assert hub_cache() == Path("/hf/hub")
    monkeypatch.setenv("HF_HUB_CACHE", "/hub")
    assert hub_cache() == Path("/hub")


def test_which_folder_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789" * 4
    repository = tmp_path / "hub" / "models--org--llama"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    keys = ("org/llama@main", f"org/llama@{commit}", "org/llama@other", "org/none@main")
    assert [cached_folder(key) for key in keys] == [None] * 4
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert [cached_folder(key) for key in keys] == [snapshot, snapshot, None, None]
    assert cached_folder("demo") == DEMO_PATH
    assert cached_folder(str(tmp_path)) is None
    assert cached_folder(str(snapshot)) == snapshot
