"""The speed of the kernels on a card, against what a copy reaches; `sweep` tries other settings."""

from __future__ import annotations

from typing import Any

from common import kernels_of, limits, milliseconds, options, result, say


def main() -> None:
    given = options(
        __doc__, {"context": 70, "batches": "1,3", "vocab": 300, "rows": 8, "sweep": 0},
        context=640, batches="1,16,256,1024", vocab=128256, rows=1024, sweep=1,
    )  # fmt: skip
    batches = [int(batch) for batch in given.batches.split(",")]
    with result("kernels", given) as made:
        made |= limits()
        made.save()
        copy = made["copy_bytes_per_second"]
        say(f"copy {copy / 1e12:.2f} TB/s, products {made['matrix_flops'] / 1e12:.0f} TFLOP/s")
        made.gather(
            "decode",
            (
                decode(given, batch, copy, *heads)
                for heads in ((32, 8, 128), (32, 8, 64), (32, 32, 128))
                for batch in batches
            ),
        )
        made.gather(
            "groups",
            (
                grouped_decode(given.device, groups, *heads)
                for heads in ((32, 8, 64), (32, 8, 128))
                for groups in (DRY_GROUPS if given.device == "cpu" else GROUPS)
            ),
        )
        made.gather(
            "sampling", (sampling(given, batch, kind) for batch in batches for kind in SAMPLING)
        )
        made.gather("small", small_kernels(given, copy))
        if given.sweep:
            wide = ((32, 8, 128), (32, 8, 64))
            made.gather("sweep", (sweep(given, copy, *heads) for heads in wide))
            made.gather("sampling_sweep", sweep_sampling(given))


def decode(
    given: Any, batch: int, copy: float, heads: int, kv_heads: int, dim: int
) -> dict[str, Any]:
    """The time of decode attention, and its share of a copy's rate."""
    import torch

    from worker.engine.cuda.kernels.reference import splits_of

    kernels, device, context = kernels_of(given.device), given.device, given.context
    pages = -(-context // 64)
    cache = torch.randn(batch * pages, 2, kv_heads, 64, dim, device=device, dtype=torch.bfloat16)
    blocks = torch.randperm(batch * pages, device=device).int()
    first = (torch.arange(batch, device=device) * pages).int()
    positions = torch.full((batch,), context - 1, device=device).int()
    query = torch.randn(batch, heads, dim, device=device, dtype=torch.bfloat16)
    lengths = [context] * batch
    splits = splits_of(lengths, 64, torch.device(device), heads=heads, head_dim=dim)
    took = milliseconds(
        lambda: kernels.decode_attention(query, cache, positions, first, blocks, splits=splits),
        calls=5,
    )
    rate = batch * context * 2 * kv_heads * dim * 2 / took * 1e3
    say(f"decode {heads}/{kv_heads}x{dim}, batch {batch}, context {context}: {took:.3f} ms, "
        f"{rate / 1e12:.2f} TB/s, {rate / copy:.0%} of a copy")  # fmt: skip
    return {"heads": [heads, kv_heads, dim], "batch": batch, "ms": took, "of_copy": rate / copy}


GROUPS = {
    # Rows, rows of a group, common positions, own positions.
    "64 samples of 16 prompts": (1024, 64, 512, 128),
    "16 samples of 16 prompts": (256, 16, 512, 128),
    "8 samples of 128 prompts": (1024, 8, 512, 128),
    "one long prefix": (256, 256, 4096, 128),
    "one prefix, few rows": (16, 16, 2048, 128),
}
"""The first is a step of 128 prompts with 64 samples each."""


DRY_GROUPS = {"4 samples of 2 prompts": (8, 4, 256, 64)}


def grouped_decode(device: str, kind: str, heads: int, kv_heads: int, dim: int) -> dict[str, Any]:
    """Decode attention of rows with common prefixes: without groups, and in groups."""
    import torch

    from worker.engine.cuda.groups import MIN_SAVED_BYTES, PrefixIndex, padded_tiles
    from worker.engine.cuda.kernels import reference

    decode_attention = kernels_of(device).decode_attention
    batch, size, common, own = {**GROUPS, **DRY_GROUPS}[kind]
    shared, more, groups = common // 64, -(-own // 64), batch // size
    pages = groups * shared + batch * more
    cache = torch.randn(pages, 2, kv_heads, 64, dim, device=device, dtype=torch.bfloat16)
    index = PrefixIndex(
        block=64, heads_per_kv_head=heads // kv_heads, block_bytes=cache.nbytes // pages
    )
    tables, sequences = [], []
    for row in range(batch):
        common_pages = range(row // size * shared, (row // size + 1) * shared)
        begin = groups * shared + row * more
        tables.append([*common_pages, *range(begin, begin + more)])
        sequences.append(_sequence([page + 1 for page in common_pages], common + own))
    found = index.groups(sequences)

    def ints(values: Any) -> torch.Tensor:
        return torch.tensor(values, device=device).int()

    prefixes = None
    if found is not None:
        padding = padded_tiles(len(found.tiles)) - len(found.tiles)
        tiles = [*found.tiles.tolist(), *[[0, 0, 0, 0]] * padding]
        deepest = reference.split_count(common, 64)
        prefixes = reference.Prefixes(
            ints(tiles), ints(found.members), ints(found.shared), 1 << (deepest - 1).bit_length()
        )
    query = torch.randn(batch, heads, dim, device=device, dtype=torch.bfloat16)
    given = (
        query,
        cache,
        torch.full((batch,), common + own - 1, device=device).int(),
        (torch.arange(batch, device=device) * (shared + more)).int(),
        ints(tables).view(-1),
    )
    lengths = [common + own] * batch
    splits = reference.splits_of(lengths, 64, cache.device, heads=heads, head_dim=dim)
    outs = [decode_attention(*given, splits=splits, prefixes=each) for each in (None, prefixes)]
    error = float((outs[0].float() - outs[1].float()).abs().max())
    plain, together = (
        milliseconds(lambda each=each: decode_attention(*given, splits=splits, prefixes=each))
        for each in (None, prefixes)
    )
    saved = (batch - groups) * shared * cache.nbytes // pages
    say(f"{kind}, {heads}/{kv_heads}x{dim}: plain {plain:.3f} ms, in groups {together:.3f} ms, "
        f"{(plain - together) / saved * MIN_SAVED_BYTES * 1e3:.1f} us for "
        f"{MIN_SAVED_BYTES >> 20} MiB not read, largest difference {error:.4f}"
        f"{'' if prefixes else ': NOT GROUPED, as the index finds it not worth it'}")  # fmt: skip
    return {"kind": kind, "heads": [heads, kv_heads, dim], "plain_ms": plain, "ms": together,
            "saved_bytes": saved, "difference": error, "grouped": prefixes is not None}  # fmt: skip


def _sequence(prefix_ids: list[int], length: int) -> Any:
    from nightherd.params import SamplingParams
    from worker.engine.interface import EngineRequest
    from worker.engine.sequence import Sequence

    made = Sequence(EngineRequest((0,) * length, SamplingParams(), (0,), 1), 0, 0)
    made.prefix_ids = prefix_ids
    return made


def sweep(given: Any, copy: float, heads: int, kv_heads: int, dim: int) -> dict[str, Any]:
    """Decode attention with other warps and stages, then other lengths of its splits, the best
    first; the present settings are among them."""
    from worker.engine.cuda.kernels import attention, reference

    before = attention.WARPS, attention.STAGES, attention.SPLIT_BLOCKS
    tried: dict[tuple[int, int, int], float] = {}

    def set_to(warps: int, stages: int, split: int) -> None:
        attention.WARPS, attention.STAGES = warps, stages
        attention.SPLIT_BLOCKS = reference.SPLIT_BLOCKS = split  # type: ignore[misc]

    def attempt(*knobs: int) -> None:
        set_to(*knobs)
        say(f"warps {knobs[0]}, stages {knobs[1]}, blocks of a split {knobs[2]}:")
        try:
            shares = [
                float(decode(given, batch, copy, heads, kv_heads, dim)["of_copy"])
                for batch in (64, 256, 1024)
            ]
        except Exception as error:  # what Triton and its compiler raise
            say(f"  not possible: {error}")
            return
        tried[knobs[0], knobs[1], knobs[2]] = sum(shares[1:]) / 2

    try:
        for warps, stages in ((4, 3), (4, 5), (8, 3), (8, 5), (2, 3), (4, 2)):
            attempt(warps, stages, before[2])
        best = max(tried, key=tried.__getitem__)
        for split in (2, 8, 16):
            attempt(best[0], best[1], split)
    finally:
        set_to(*before)
    order = sorted(tried.items(), key=lambda item: -item[1])
    say(f"BEST for {heads}/{kv_heads}x{dim}: (warps, stages, blocks of a split) {order[0][0]}, "
        f"{order[0][1]:.0%} of a copy; now {before}, {tried.get(before, 0):.0%}")  # fmt: skip
    return {"heads": [heads, kv_heads, dim], "tried": [[*knobs, share] for knobs, share in order]}


def sweep_sampling(given: Any) -> list[dict[str, Any]]:
    """Sampling for 512 rows with other tiles."""
    from worker.engine.cuda.kernels import sampling as kernels

    names = ("_TILE", "_NOISE_TILE", "_LANES")
    before = tuple(getattr(kernels, name) for name in names)
    made = []
    for tiles in ((4096, 2048, 256), (8192, 2048, 512), (2048, 1024, 128), (4096, 4096, 256)):
        for name, tile in zip(names, tiles, strict=True):
            setattr(kernels, name, tile)
        say(f"tiles {dict(zip(names, tiles, strict=True))}, now {before}:")
        made += [
            {"tiles": tiles, **sampling(given, 512, kind)} for kind in ("greedy", "free", "top_p")
        ]
    for name, tile in zip(names, before, strict=True):
        setattr(kernels, name, tile)
    return made


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
    took = milliseconds(lambda: kernels.sample(logits, vocab, *columns), calls=5)
    say(f"sampling {kind}, batch {batch}: {took:.3f} ms")
    return {"kind": kind, "batch": batch, "ms": took}


def small_kernels(given: Any, copy: float) -> list[dict[str, Any]]:
    """The time of a layer's other kernels, at the 8B shape."""
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
    kernels_and_bytes = {
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
    for name, (work, moved) in kernels_and_bytes.items():
        took = milliseconds(work, calls=10)
        share = moved / took * 1e3 / copy
        say(f"{name}, {rows} rows: {took * 1e3:.0f} us, {share:.0%} of a copy")
        made.append({"kernel": name, "ms": took, "of_copy": share})
    return made


if __name__ == "__main__":
    main()
