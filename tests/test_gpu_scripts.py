"""The scripts that measure on a card, tried without one: no wrong name waits for the card."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
OURS = ("card", "common", "machine", "shapes", "workloads", "driving", "drive_transformers_cb")


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As when a script of one of those folders is started; afterwards nothing of it is left."""
    for folder in (BENCHMARKS, BENCHMARKS / "gpu", BENCHMARKS / "peers"):
        monkeypatch.syspath_prepend(str(folder))
    yield
    for name in OURS:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("script", ["kernels", "decode", "figure"])
def test_a_script_runs_dry(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    path = str(BENCHMARKS / "gpu" / f"{script}.py")
    monkeypatch.setattr(sys, "argv", [path, "--dry"])
    runpy.run_path(path, run_name="__main__")
    (written,) = tmp_path.iterdir()
    made = json.loads(written.read_text())
    assert "failed" not in made
    assert made == json.loads(capsys.readouterr().out.splitlines()[-1])
    if script == "decode":
        assert made["float32_tokens_equal"] == 1
        assert 0 < made["bf16_error"]["mean_ratio"] <= 1.5
        assert sum(made["steps"][0]["where"]["parts"].values()) == pytest.approx(1)
    if script == "figure":
        assert made["engine"] == "cuda"
        assert made["share_of_floor"] > 0


def test_without_a_card_a_script_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = str(BENCHMARKS / "gpu" / "figure.py")
    monkeypatch.setattr(sys, "argv", [path])
    with pytest.raises(SystemExit, match="no card here"):
        runpy.run_path(path, run_name="__main__")


def test_the_floor_by_hand() -> None:
    card = importlib.import_module("card")
    shape = importlib.import_module("shapes").SHAPES["8B"]
    rates = {"matrix_flops": 790e12, "copy_bytes_per_second": 4.3e12}
    request = {"prompt": [0] * 512, "out": 256}
    # ENGINE's number for this shape on such a card: 13.5 thousand tokens a second.
    assert 256 / card.least_seconds("fixed", shape, [request], rates) == pytest.approx(
        13_500, rel=0.05
    )
    # 64 samples of a prompt: it is computed and read once.
    shared = card.least_seconds("samples", shape, [request] * 64, rates)
    alone = 64 * card.least_seconds("fixed", shape, [request], rates)
    own = [{"prompt": [0], "out": 256}] * 64
    assert card.least_seconds("fixed", shape, own, rates) < shared < 0.6 * alone


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "linears"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "linears"),
        ("_decode", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("_sample", "sampling"),
        ("_rms_norm", "rest"),
        ("_rotate_and_write", "rest"),
        ("_silu_mul", "rest"),
        ("Memcpy DtoD (Device -> Device)", "rest"),
    ],
)
def test_where_a_kernel_belongs(kernel: str, part: str) -> None:
    assert importlib.import_module("card").part_of(kernel) == part


def test_continuous_batching_by_torchs_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer at its best where no package for flash attention is: its tokens are right."""
    import torch
    from torch.nn.attention import varlen
    from torch.nn.functional import scaled_dot_product_attention
    from transformers import modeling_flash_attention_utils as flash

    calls = []

    def on_a_cpu(
        q: Any, k: Any, v: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int,
        *, scale: float, window_size: Any,
    ) -> Any:  # fmt: skip
        calls.append(len(q))
        out = torch.zeros_like(q)
        for first, last, begin, end in zip(
            *(sums[at].tolist() for sums in (cu_q, cu_k) for at in (slice(-1), slice(1, None))),
            strict=True,
        ):
            rows, keys = last - first, end - begin
            mask = torch.arange(keys) <= torch.arange(keys - rows, keys)[:, None]
            one = scaled_dot_product_attention(
                q[first:last].transpose(0, 1)[None],
                *(part[begin:end].transpose(0, 1)[None] for part in (k, v)),
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
            out[first:last] = one[0].transpose(0, 1)
        return out

    monkeypatch.setattr(varlen, "varlen_attn", on_a_cpu)
    # The driver, which has a process of its own, changes these for good.
    monkeypatch.setattr(flash, "_lazy_imports", flash._lazy_imports)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    driver = importlib.import_module("drive_transformers_cb")
    from tests.checkpoints import tiny_llama
    from tests.engines import PROMPTS

    requests = [{"prompt": list(prompt), "out": 6} for prompt in PROMPTS[:3]]
    given = SimpleNamespace(greedy=True, context=128, device="cpu", requests=requests)
    config = {"page_size": 32, "num_blocks": 32, "max_batch_tokens": 256}
    answers = []
    for attention in ("sdpa", driver.TORCH_FLASH):
        batches = driver.Batches(
            tiny_llama(), given, {"attention": attention, "config": config}, [64, 6]
        )
        seen: list[Any] = []
        get = batches._manager.get_result

        def watched(get: Any = get, seen: list[Any] = seen, **given: Any) -> Any:
            output = get(**given)
            if output is not None and output.is_finished():
                seen.append((output.request_id, list(output.generated_tokens)))
            return output

        batches._manager.get_result = watched
        try:
            assert batches.generate(requests) == [6, 6, 6]
        finally:
            batches.close()
        answers.append(sorted(seen))
        assert bool(calls) == (attention == driver.TORCH_FLASH)
    assert answers[0] == answers[1]


def test_the_fastest_settings_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a card, where one of them does not run."""
    driver = importlib.import_module("drive_transformers_cb")
    from tests.checkpoints import tiny_llama

    measured: list[Any] = []
    requests = [{"prompt": [3, 4, 5 + place], "out": 3} for place in range(4)]
    given = SimpleNamespace(
        greedy=True,
        context=128,
        threads=2,
        device="cuda",
        kv_bytes=32 * 32 * 1024,
        kv_bytes_per_token=1024,
        requests=requests,
        option=lambda name, default: {"page_size": 32, "max_batch_tokens": 64}.get(name, default),
        measure=lambda generate, settings, more: measured.append((generate(requests), settings)),
    )
    wanted = driver.candidates(given)
    assert [one["name"] for one in wanted] == ["torch-flash", "sdpa"]
    assert wanted[0]["config"]["use_cuda_graph"]
    assert not wanted[1]["config"].get("use_cuda_graph")
    given.device = "cpu"
    assert [one["config"]["num_blocks"] for one in driver.candidates(given)] == [32]
    monkeypatch.setattr(driver, "candidates", lambda given: wanted)
    monkeypatch.setattr(driver, "transformers_model", lambda given, **more: tiny_llama())

    def break_(model: Any) -> None:
        raise RuntimeError("no flash attention here")

    monkeypatch.setattr(driver, "use_torch_flash", break_)
    driver.main(given)
    ((lengths, settings),) = measured
    assert lengths == [3] * 4
    assert settings["name"] == "sdpa"
    assert settings["tried"]["torch-flash"] == "RuntimeError: no flash attention here"
    assert settings["tried"]["sdpa"] > 0
