"""What the settings' page says of an engine's defaults is what they are."""

from __future__ import annotations

import pytest

from nightherd.settings import Settings
from worker.engine import build
from worker.engine.cuda import memory

FOUR_FIFTHS = 0.8


def said(name: str) -> str:
    return Settings.model_fields[name].description or ""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("max_batch", f"{build.CPU_SEQUENCES} on a CPU, {build.CUDA_SEQUENCES} on a GPU, "),
        ("max_batch", f"{build.PLAIN_SEQUENCES} with `transformers`"),
        ("token_budget", f"{build.CPU_BUDGET} on a CPU, {build.CUDA_BUDGET} on a GPU"),
        ("kv_memory", f"{memory.GPU_MEMORY_UTILIZATION:.0%}".replace("%", " % of the card less")),
        ("kv_memory", f"at most {build._CPU_MAX >> 30} GiB"),
    ],
)
def test_a_setting_says_its_default(name: str, words: str) -> None:
    assert words in said(name)


def test_shares_in_words() -> None:
    assert build._CPU_SHARE == 1 / 4
    assert "to a quarter of what is free" in said("kv_memory")
    assert build._CUDA_SHARE == FOUR_FIFTHS
    assert "with plain torch four fifths of what is free" in said("kv_memory")
