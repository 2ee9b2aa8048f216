"""What the kernels compile to for a card, without one: registers, spills, instructions.

Every launcher is called as the engine calls it, with tensors on the CPU; a driver that says it is
such a card makes Triton compile, for those very arguments, and nothing is launched. Ends with the
number of kernels that do not compile.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from common import say  # and the engine is found
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from worker.engine.cuda.kernels import attention, layers, prefill, sampling
from worker.engine.cuda.kernels.reference import Prefixes, Splits, splits_of, tiles_of


class _Card:
    """A driver without a card: it only names the target."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: target.arch
        self.get_current_stream = lambda device: 0


class Kernel(NamedTuple):
    """Facts of a compiled kernel."""

    name: str
    registers: int
    stack: int
    """Bytes of local memory that a thread needs: what registers could not hold."""
    shared: int
    warps: int
    products: dict[str, int]
    """Matrix instructions."""
    loads: dict[str, int]
    """Loads and asynchronous copies from global memory, by width in bytes."""

    @property
    def resident(self) -> int:
        """Programs that fit on a multiprocessor of sm_90 at once."""
        per_warp = -(-max(1, self.registers) * 32 // 256) * 256
        return min(
            65536 // (per_warp * self.warps),
            64 // self.warps,
            32,
            233472 // (self.shared + 1024),
        )


def compile_only(target: GPUTarget) -> list[Any]:
    """From now on launches compile for `target`, and what they compile is in this list."""
    driver.set_active(_Card(target))
    seen: list[Any] = []

    def launcher(self: Any, grid: Any) -> Callable[..., Any]:
        def launch(*given: Any, **more: Any) -> None:
            seen.append(self.run(*given, grid=grid, warmup=True, **more))

        return launch

    JITFunction.__getitem__ = launcher
    return seen


def facts(name: str, kernel: Any) -> Kernel:
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        used = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", used)}
    products: dict[str, int] = {}
    for found in re.findall(r"\b(wgmma\.mma_async\S*?m\d+n\d+k\d+|mma\.sync\S*?m\d+n\d+k\d+)", ptx):
        products[found] = products.get(found, 0) + 1
    loads: dict[str, int] = {}
    for width, of in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx):
        size = f"ld {int(width or 1) * int(of) // 8}"
        loads[size] = loads.get(size, 0) + 1
    for of in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x([0-9a-f]+)", ptx):
        size = f"cp.async {int(of, 16)}"
        loads[size] = loads.get(size, 0) + 1
    return Kernel(
        name,
        numbers["REG"],
        numbers["STACK"],
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        products,
        loads,
    )


def launches(few: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches by name: all of them, or those of the commonest configuration."""
    kinds = [torch.bfloat16] if few else [torch.bfloat16, torch.float32]
    shapes = (
        [(32, 8, 128)]
        if few
        else [(32, 8, 128), (32, 8, 64), (9, 3, 64), (32, 32, 128), (8, 1, 128)]
    )
    for dtype in kinds:
        short = "bf16" if dtype == torch.bfloat16 else "f32"
        for heads, kv_heads, dim in shapes:
            for context in (200, 700):
                for lse in (False,) if few else (False, True):
                    name = f"decode {short} {heads}/{kv_heads}x{dim} context {context}"
                    name += " lse" if lse else ""
                    yield (
                        name,
                        functools.partial(_decode, dtype, heads, kv_heads, dim, context, lse),
                    )
            for name, work in (("prefix", _prefix), ("prefill", _prefill)):
                yield (
                    f"{name} {short} {heads}/{kv_heads}x{dim}",
                    functools.partial(work, dtype, heads, kv_heads, dim),
                )
            for norms in (False,) if few else (False, True):
                name = f"rotate {short} {heads}/{kv_heads}x{dim}{' norms' if norms else ''}"
                yield name, functools.partial(_rotate, dtype, heads, kv_heads, dim, norms)
        for hidden, add in (
            [(4096, True)]
            if few
            else [(576, False), (2048, True), (4096, False), (4096, True), (8192, True)]
        ):
            yield f"rms_norm {short} {hidden} {add}", functools.partial(_norm, dtype, hidden, add)
        for width in [14336] if few else [1536, 8192, 11008, 14336]:
            yield f"silu_mul {short} {width}", functools.partial(_silu, dtype, width)
        for vocab in [128256] if few else [128256, 151643, 32000]:
            yield f"sample {short} {vocab}", functools.partial(_sample, dtype, vocab)
        yield f"mask {short}", functools.partial(_mask, dtype)


def _ints(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32)


def _decode(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, context: int, lse: bool
) -> None:
    rows = 8
    qkv = torch.zeros(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    attention.decode_attention(
        qkv[:, : heads * dim].view(rows, heads, dim),
        torch.zeros(4, 2, kv_heads, 64, dim, dtype=dtype),
        _ints(rows),
        _ints(rows),
        _ints(80),
        splits=_splits(context, rows, heads, dim) if context > 256 else None,
        lse=torch.zeros(rows, heads) if lse else None,
    )


def _prefix(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    """Rows with a common prefix, then each one's own blocks."""
    rows = 16
    qkv = torch.zeros(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    attention.decode_attention(
        qkv[:, : heads * dim].view(rows, heads, dim),
        torch.zeros(4, 2, kv_heads, 64, dim, dtype=dtype),
        _ints(rows),
        _ints(rows),
        _ints(80),
        splits=_splits(700, rows, heads, dim),
        prefixes=Prefixes(_ints(16, 4), _ints(rows), _ints(rows), 4),
    )


def _splits(context: int, rows: int, heads: int, dim: int) -> Splits:
    return splits_of([context] * rows, 64, torch.device("cpu"), heads=heads, head_dim=dim)


def _prefill(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    rows = 300
    qkv = torch.zeros(rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    prefill.prefill_attention(
        qkv[:, : heads * dim].view(rows, heads, dim),
        torch.zeros(4, 2, kv_heads, 64, dim, dtype=dtype),
        _ints(rows),
        _ints(rows),
        _ints(80),
        torch.from_numpy(tiles_of([(0, rows, 0)], heads // kv_heads, dtype)),
    )


def _rotate(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, norms: bool) -> None:
    rows = 8
    norm = torch.ones(dim, dtype=dtype) if norms else None
    angles = torch.zeros(100, dim // 2)
    layers.rotate_and_write(
        torch.zeros(rows, (heads + 2 * kv_heads) * dim, dtype=dtype),
        angles,
        angles,
        _ints(rows),
        _ints(rows),
        _ints(80),
        torch.zeros(4, 2, kv_heads, 64, dim, dtype=dtype),
        heads=heads,
        q_norm=norm,
        k_norm=norm,
        eps=1e-6,
    )


def _norm(dtype: torch.dtype, hidden: int, add: bool) -> None:
    rows = torch.zeros(8, hidden, dtype=dtype)
    layers.rms_norm(rows, rows[0].clone(), 1e-5, rows.clone() if add else None)


def _silu(dtype: torch.dtype, width: int) -> None:
    layers.silu_mul(torch.zeros(8, 2 * width, dtype=dtype))


def _sample(dtype: torch.dtype, vocab: int) -> None:
    rows = 4
    floats = torch.zeros(6, rows)
    sampling.sample(
        torch.zeros(rows, -(-vocab // 64) * 64, dtype=dtype),
        vocab,
        floats[2],
        _ints(rows),
        floats[4],
        floats[5],
        torch.zeros(rows, dtype=torch.int64),
        _ints(rows),
        _ints(rows),
        torch.zeros(rows),
    )


def _mask(dtype: torch.dtype) -> None:
    sampling.mask_logits(torch.zeros(4, 32000, dtype=dtype), _ints(2), _ints(2, 1000))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--capability", default="90", help="of the cards: 80,90,100")
    parser.add_argument("--few", action="store_true", help="the commonest configuration only")
    parser.add_argument("--keep", metavar="FOLDER", help="for TTGIR and PTX")
    given = parser.parse_args()
    # Not part of the output: another version of Triton compiles other kernels of the same sources.
    print(f"triton {triton.__version__}", file=sys.stderr, flush=True)
    wrong = 0
    for capability in map(int, given.capability.split(",")):
        seen = compile_only(GPUTarget("cuda", capability, 32))
        for name, work in launches(given.few):
            seen.clear()
            try:
                work()
                made = [facts(f"{kernel.metadata.name} ({name})", kernel) for kernel in seen]
            except Exception as error:  # whatever Triton and ptxas raise
                wrong += 1
                say(f"sm_{capability} {name}: FAILED, {type(error).__name__}: {error}")
                continue
            for fact, kernel in zip(made, seen, strict=True):
                say(
                    f"sm_{capability} {fact.name}: {fact.registers} registers, {fact.stack} stack, "
                    f"{fact.shared} shared, {fact.warps} warps, {fact.resident} resident; "
                    f"{fact.products or ''} {fact.loads}"
                )
                if given.keep:
                    folder = Path(given.keep)
                    folder.mkdir(parents=True, exist_ok=True)
                    for kind in ("ttgir", "ptx"):
                        file = folder / f"{re.sub('[^a-z0-9]+', '-', fact.name)}.{kind}"
                        file.write_text(kernel.asm[kind])
    return wrong


if __name__ == "__main__":
    sys.exit(main())
