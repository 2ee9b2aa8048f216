"""Kinds of engine: today's names and the old spellings, as settings and in stored provenance."""

from __future__ import annotations

from typing import get_args

import pytest

from nightherd.engine_kinds import EngineKind, EngineSetting, requested_kind, stored_kind
from nightherd.errors import SettingsError
from nightherd.settings import load_settings


@pytest.mark.parametrize("name", get_args(EngineSetting))
def test_each_spelling_is_a_setting(name: EngineSetting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTHERD_ENGINE", name)
    for device in ("cpu", "cuda"):
        kind = requested_kind(load_settings().engine, device)
        assert kind in get_args(EngineKind)
        if name in get_args(EngineKind):
            assert kind == name


def test_old_settings_mean_what_they_meant() -> None:
    assert requested_kind("kernels", "cpu") == "cpu"
    assert requested_kind("kernels", "cuda") == "cuda"
    assert requested_kind("generate", "cpu") == requested_kind("generate", "cuda") == "transformers"


def test_an_unknown_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTHERD_ENGINE", "vllm")
    with pytest.raises(SettingsError, match="NIGHTHERD_ENGINE"):
        load_settings()


def test_old_rows_have_todays_names() -> None:
    assert stored_kind("kernels") == "cpu"
    assert stored_kind("generate") == "transformers"
    for name in ("cpu", "cuda", "torch", "transformers", "a test's"):
        assert stored_kind(name) == name
