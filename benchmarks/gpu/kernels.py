"""1. The kernels on a card: their tests, then their speed against what a copy reaches."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from common import ROOT, kernels_of, limits, milliseconds, options, result, say


def main() -> None:
    given = options(
        __doc__, {"context": 70, "batches": "1,3", "vocab": 300, "rows": 8, "tests": 0},
        context=640, batches="1,16,256,1024", vocab=128256, rows=1024, tests=1,
    )  # fmt: skip
    batches = [int(batch) for batch in given.batches.split(",")]
    with result("kernels", given) as made:
        if given.tests:
            made["tests"] = run_tests()
        made |= limits()
        say(f"copy {made['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
            f"products {made['matrix_flops'] / 1e12:.0f} TFLOP/s")  # fmt: skip
        made["decode"] = [
            decode(given, batch, made["copy_bytes_per_second"], *heads)
            for heads in ((32, 8, 128), (32, 8, 64), (32, 32, 128))
            for batch in batches
        ]
        made["sampling"] = [sampling(given, batch, kind) for batch in batches for kind in SAMPLING]
        made["small"] = small_kernels(given, made["copy_bytes_per_second"])


def run_tests() -> int:
    folder = ROOT / "benchmarks" / "gpu"
    command = [
        *(sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "device_fixture"),
        *("-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={ROOT}"),
        *("--import-mode=importlib", str(ROOT / "tests/worker/engine/cuda/test_kernels.py")),
    ]
    paths = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=False).returncode


def decode(
    given: Any, batch: int, copy: float, heads: int, kv_heads: int, dim: int
) -> dict[str, Any]:
    import torch

    from worker.engine.triton_kernels.reference import splits_for

    kernels, device, context = kernels_of(given.device), given.device, given.context
    pages = -(-context // 64)
    cache = torch.randn(batch * pages, 2, kv_heads, 64, dim, device=device, dtype=torch.bfloat16)
    blocks = torch.randperm(batch * pages, device=device).int()
    first = (torch.arange(batch, device=device) * pages).int()
    positions = torch.full((batch,), context - 1, device=device).int()
    query = torch.randn(batch, heads, dim, device=device, dtype=torch.bfloat16)
    splits = splits_for(context, 64)
    took = milliseconds(
        lambda: kernels.decode_attention(query, cache, positions, first, blocks, splits=splits)
    )
    rate = batch * context * 2 * kv_heads * dim * 2 / took * 1e3
    say(f"decode {heads}/{kv_heads}x{dim}, batch {batch}, context {context}: {took:.3f} ms, "
        f"{rate / 1e12:.2f} TB/s, {rate / copy:.0%} of a copy")  # fmt: skip
    return {"heads": [heads, kv_heads, dim], "batch": batch, "ms": took, "of_copy": rate / copy}


SAMPLING: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "free": {},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 50},
    "min_p": {"min_p": 0.05},
}


def sampling(given: Any, batch: int, kind: str) -> dict[str, Any]:
    import torch

    kernels, device, vocab = kernels_of(given.device), given.device, given.vocab
    logits = torch.randn(batch, vocab, device=device, dtype=torch.bfloat16) * 3
    row = {"temperature": 1.0, "top_k": vocab, "top_p": 1.0, "min_p": 0.0, **SAMPLING[kind]}

    def column(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((batch,), row[name], dtype=dtype, device=device)

    columns = (
        column("temperature", torch.float32),
        column("top_k", torch.int32),
        column("top_p", torch.float32),
        column("min_p", torch.float32).log(),
        torch.arange(batch, device=device) * 2**40 + 17,
        torch.zeros(batch, dtype=torch.int32, device=device),
        torch.zeros(batch, dtype=torch.int32, device=device),
        torch.zeros(batch, device=device),
    )
    took = milliseconds(lambda: kernels.sample(logits, vocab, *columns))
    say(f"sampling {kind}, batch {batch}: {took:.3f} ms")
    return {"kind": kind, "batch": batch, "ms": took}


def small_kernels(given: Any, copy: float) -> list[dict[str, Any]]:
    """At the 8B shape."""
    import torch

    layers, device, rows = kernels_of(given.device), given.device, given.rows

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    hidden, residual, weight = random(rows, 4096), random(rows, 4096), random(4096)
    gate_up, qkv = random(rows, 2 * 14336), random(rows, 48 * 128)
    cache = random(rows, 2, 8, 64, 128)
    angles = torch.rand(2048, 64, device=device)
    numbers = torch.arange(rows, device=device).int()
    # Each row in a block of its own.
    positions = numbers % 64
    works = {
        "rms_norm": (lambda: layers.rms_norm(hidden, weight, 1e-5, residual), 4 * hidden.nbytes),
        "silu_mul": (lambda: layers.silu_mul(gate_up), 1.5 * gate_up.nbytes),
        "rotate_and_write": (
            lambda: layers.rotate_and_write(
                qkv, angles, angles, positions, numbers, numbers, cache, heads=32
            ),
            2 * qkv.nbytes,
        ),
    }
    made = []
    for name, (work, moved) in works.items():
        took = milliseconds(work)
        share = moved / took * 1e3 / copy
        say(f"{name}, {rows} rows: {took * 1e3:.0f} us, {share:.0%} of a copy")
        made.append({"kernel": name, "ms": took, "of_copy": share})
    return made


if __name__ == "__main__":
    main()
