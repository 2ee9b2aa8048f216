"""Where settings come from, which goes first, and what is said about a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from nightherd.errors import SettingsError
from nightherd.settings import Settings, load_settings, redact_url


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_environment_before_env_file_before_toml_before_default(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "nightherd.toml").write_text("slots = 2\nsave_samples = 2\nmax_batch = 2\n")
    (folder / ".env").write_text("NIGHTHERD_SLOTS=3\nNIGHTHERD_SAVE_SAMPLES=3\nOTHER=x\n")
    monkeypatch.setenv("NIGHTHERD_SLOTS", "4")
    settings = load_settings()
    assert (settings.slots, settings.save_samples, settings.max_batch) == (4, 3, 2)
    assert settings.tick_seconds == Settings.model_fields["tick_seconds"].default


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTHERD_BROKER_URL", "")
    assert load_settings().broker_url is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (".env", "NIGHTHERD_SLOT=3\n"),
        ("nightherd.toml", "slot = 3\n"),
    ],
)
def test_an_unknown_name_is_refused_with_its_source(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(SettingsError, match=rf"(?i)slot in {file}; did you mean .*slots"):
        load_settings()


def test_a_broken_toml_file_is_one_line(folder: Path) -> None:
    (folder / "nightherd.toml").write_text("slots = \n")
    with pytest.raises(SettingsError, match=r"nightherd\.toml cannot be read: "):
        load_settings()


def test_an_invalid_value_is_named_with_its_source(folder: Path) -> None:
    (folder / "nightherd.toml").write_text("slots = 0\n")
    expected = r"NIGHTHERD_SLOTS in nightherd\.toml is invalid: .*1 \(got 0\)"
    with pytest.raises(SettingsError, match=expected):
        load_settings()


def test_an_invalid_secret_is_not_shown(folder: Path) -> None:
    (folder / "nightherd.toml").write_text("database_url = ['hush']\n")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert "hush" not in str(caught.value)
    assert "NIGHTHERD_DATABASE_URL" in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:hush@db/x", "postgresql://me:***@db/x"),
        ("redis://:hush@host:6379/0", "redis://:***@host:6379/0"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis+socket:///a/b@c/broker.sock", "redis+socket://***"),
        ("redis://:12/hush@host/0", "redis://***"),
        ("redis://:hu#sh@host/0", "redis://***"),
    ],
)
def test_passwords_are_redacted(url: str, shown: str) -> None:
    assert redact_url(url) == shown


def test_urls_are_secret_in_the_settings_own_text() -> None:
    settings = Settings.model_validate({"broker_url": "redis://:hush@host/0"})
    assert "hush" not in repr(settings)


@pytest.mark.parametrize(
    "url", ["foo", "http://x", "redis://:12/hush@host/0", "redis://:hu#sh@host/0", "redis://h:x"]
)
def test_a_broker_url_that_cannot_be_read_is_refused_unseen(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHTHERD_BROKER_URL", url)
    with pytest.raises(SettingsError, match=r"NIGHTHERD_BROKER_URL .* must be redis://") as caught:
        load_settings()
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("url", ["redis://h", "rediss://:a%2Fb@h:1/0", "redis+socket:///a/b.sock"])
def test_broker_urls_that_can_be_read(url: str) -> None:
    assert Settings.model_validate({"broker_url": url}).broker_url is not None


def test_postgresql_urls_get_their_driver() -> None:
    for url in ("postgres://db/x", "postgresql://db/x", "postgresql+psycopg://db/x"):
        settings = Settings.model_validate({"database_url": url})
        assert settings.resolved_database_url() == "postgresql+psycopg://db/x"


def test_the_home_is_absolute(folder: Path) -> None:
    assert Settings.model_validate({"home": "data"}).home == folder / "data"
