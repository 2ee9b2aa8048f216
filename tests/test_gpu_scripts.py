"""The scripts that measure on a card, tried without one: no wrong name waits for the card."""

from __future__ import annotations

import ast
import importlib
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
GPU = BENCHMARKS / "gpu"
KERNELS = BENCHMARKS.parent / "worker" / "engine" / "cuda" / "kernels"


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As when a script of one of those folders is started; afterwards nothing of it is left."""
    for folder in (BENCHMARKS, GPU, BENCHMARKS / "peers"):
        monkeypatch.syspath_prepend(str(folder))
    before = {*sys.modules}
    yield
    for name in {*sys.modules} - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


class Script:
    """A script run dry, in this process; `writes` are all states of its JSON."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self._folder, self._monkeypatch, self._capsys = folder, monkeypatch, capsys
        monkeypatch.setenv("OUT", str(folder))
        self.writes: list[dict[str, Any]] = []
        self.common = importlib.import_module("common")
        write = self.common.write

        def noted(file: Path, found: Any) -> None:
            self.writes.append(json.loads(json.dumps(found)))
            write(file, found)

        monkeypatch.setattr(self.common, "write", noted)

    def run(self, name: str, *options: str) -> tuple[dict[str, Any], str]:
        """What it wrote, and said."""
        path = str(GPU / f"{name}.py")
        self._monkeypatch.setattr(sys, "argv", [path, "--dry", *options])
        try:
            runpy.run_path(path, run_name="__main__")
        finally:
            self.said = self._capsys.readouterr().out
        (written,) = self._folder.iterdir()
        made = json.loads(written.read_text())
        assert made == json.loads(self.said.splitlines()[-1]) == self.writes[-1]
        return made, self.said

    def stopped(self, name: str, *options: str) -> tuple[dict[str, Any], str]:
        """Likewise, of one that must have stopped, with the exit code that says so."""
        with pytest.raises(SystemExit) as ended:
            self.run(name, *options)
        assert ended.value.code == self.common.STOPPED
        made = self.writes[-1]
        assert made["stopped"] == str(ended.value)
        assert f"STOP: {made['stopped']}\n" in self.said
        return made, self.said


@pytest.fixture
def script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Script:
    return Script(tmp_path, monkeypatch, capsys)


def test_kernels_run_dry(script: Script) -> None:
    made, _ = script.run("kernels")
    assert "failed" not in made
    # Each piece was there before the next began.
    counts = [len(state.get("decode", [])) for state in script.writes]
    assert {*range(len(made["decode"]) + 1)} == {*counts}
    assert len(made["decode"]) == 6
    assert any("groups" in state and "sampling" not in state for state in script.writes)
    assert {one["kernel"] for one in made["small"]} == {
        "rms_norm",
        "silu_mul",
        "rotate_and_write",
    }


def test_decode_runs_dry(script: Script) -> None:
    made, _ = script.run("decode")
    assert "failed" not in made
    assert made["engine"] == "cuda"
    assert made["float32_tokens_equal"] == 1
    assert 0 < made["bf16_error"]["mean_ratio"] <= 1.5
    assert sum(made["steps"][0]["where"]["parts"].values()) == pytest.approx(1)
    assert all(step["captured"] for step in made["steps"])
    assert any(state.get("steps") and "where" not in state["steps"][-1] for state in script.writes)


def test_figure_runs_dry(script: Script) -> None:
    """The rounds are kept before the next begins, and before what may fail on a card."""
    made, said = script.run("figure", "--name", "mine")
    assert "failed" not in made
    assert (made["engine"], made["lacks"], made["warnings"]) == ("cuda", [], [])
    assert made["share_of_floor"] > 0
    assert made["num_blocks"] > 0
    assert made["preemptions"] == 0
    assert "profile" in made
    kept = [(len(state.get("rates", [])), "profile" in state) for state in script.writes]
    assert {(0, False), (1, False), (2, False), (2, True)} <= {*kept}
    assert script.writes[kept.index((1, False))]["share_of_floor"] > 0
    assert "engine: cuda\n" in said


@pytest.mark.parametrize(
    ("name", "options"), [("smoke", ()), ("figure", ()), ("decode", ("--tests", "0"))]
)
def test_another_engine_is_not_measured(
    name: str, options: tuple[str, ...], script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    from worker.engine.cuda.cuda_runner import CudaRunner

    monkeypatch.setattr(CudaRunner, "name", "torch")
    made, _ = script.stopped(name, *options)
    assert made["stopped"] == "the engine is 'torch', not 'cuda': the warnings say why"
    assert not {"rates", "steps", "tokens_equal"} & {*made}


def test_smoke_stops_where_no_graph_is_captured(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(step: Any) -> Any:
        raise RuntimeError("no graphs here")

    monkeypatch.setattr(script.common, "capture_of", lambda device: capture)
    made, said = script.stopped("smoke")
    assert made["stopped"] == "no graph was captured"
    assert (made["tokens_equal"], made["graphs"]) == (1, 0)
    # Of each of both engines, shown when it came and told at the end.
    assert len(made["warnings"]) == 2
    assert all("no graphs here" in line for line in made["warnings"])
    assert said.count("WARNING CUDA graphs cannot be captured") == 2
    assert said.count("WARNING of the engine: CUDA graphs cannot be captured") == 2


def test_smoke_stops_where_tokens_differ(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    from worker.engine.cuda.kernels import reference

    silu_mul = reference.silu_mul
    monkeypatch.setattr(reference, "silu_mul", lambda gate_up: 0.5 * silu_mul(gate_up))
    made, _ = script.stopped("smoke")
    assert made["tokens_equal"] < 1
    assert "float32 tokens differ from transformers': prompt of 5, at first" in made["stopped"]
    assert re.search(r"a bfloat16 token is \d\.\d deviations below", made["stopped"])


def test_smoke_asks_more_than_equal_tokens_in_bfloat16(script: Script) -> None:
    """Right kernels are far below the limit there."""
    made, _ = script.run("smoke")
    assert made["tokens_equal"] == 1
    assert made["graphs"] == made["bfloat16"]["graphs"] == 1
    assert 0 <= made["bfloat16"]["regret"] < 0.1
    assert any("tokens_equal" in state and "bfloat16" not in state for state in script.writes)


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
        ("_attend_prefixes", "attention"),
        ("_attend_prefill", "attention"),
        ("_merge_splits", "attention"),
        ("_top_k_top_p", "sampling"),
        ("_mask", "sampling"),
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


def test_every_kernel_of_ours_has_its_part() -> None:
    """Of attention or of sampling, if its module is: a new one must not be lost among the rest."""
    part_of = importlib.import_module("card").part_of
    modules = {"sampling": "sampling", "attention": "attention"}
    modules |= {"prefix": "attention", "prefill": "attention"}
    found: dict[str, str] = {}
    for file in KERNELS.glob("*.py"):
        tree = ast.parse(file.read_text())
        kernels = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and any("triton.jit" in ast.unparse(each) for each in node.decorator_list)
        }
        launched = {
            node.func.value.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Subscript)
            and isinstance(node.func.value, ast.Name)
        }
        found |= dict.fromkeys(kernels & launched, file.stem)
    assert {"_decode", "_attend_prefixes", "_top_k_top_p", "_sample", "_rms_norm"} <= {*found}
    assert {kernel: part_of(kernel) for kernel in found} == {
        kernel: modules.get(module, "rest") for kernel, module in found.items()
    }


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
                k[begin:end].transpose(0, 1)[None],
                v[begin:end].transpose(0, 1)[None],
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
