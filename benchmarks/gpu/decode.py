"""Whole decode steps: whether tokens are right, then the time of steps by graph and eagerly."""

from __future__ import annotations

import time
from typing import Any

from common import (
    SHAPES,
    Result,
    breakdown,
    capture_of,
    equal_share,
    limits,
    make_engine,
    make_runner,
    options,
    profiled,
    prompts,
    random_model,
    require_cuda,
    result,
    say,
    synchronize,
    tokens_of,
    transformers_tokens,
)


def main() -> None:
    given = options(__doc__, {"context": 256, "length": 130, "batches": "1,3", "budget": 64},
                    shape="8B", context=2048, length=640, batches="1,16,64,256,512,1024",
                    budget=8192, tests=1)  # fmt: skip
    with result(f"decode-{given.shape}", given) as made:
        if given.tests:
            made["float32_tokens_equal"] = float32_tokens(given)
            made["bf16_error"] = bfloat16_errors(given)
        made |= limits()
        made.save()
        measure_steps(given, made)


def float32_tokens(given: Any) -> float:
    """Share of greedy tokens that equal transformers', float32, sharp weights, mixed lengths."""
    out = 6 if given.dry else 64
    lengths = (1, 65) if given.dry else (1, 5, 63, 64, 65, 200, 300, 700)
    model = random_model("T", "float32", given.device, 1024, initializer_range=0.1)
    texts = [prompts(1, length, 8192, length)[0] for length in lengths]
    wanted = transformers_tokens(model, texts, out)
    distinct = min(len(set(row[:32])) for row in wanted)
    share = equal_share(greedy(model, texts, out, 1024), wanted)
    say(f"float32: {share:.1%} of tokens equal, at least {distinct} distinct in 32")
    return share


def greedy(model: Any, texts: list[list[int]], out: int, context: int) -> list[list[int]]:
    engine = make_engine(model, sequences=64, budget=512, context=context, kv_memory=1 << 30)
    engine.start()
    try:
        # From the third time on by graphs.
        rows = [tokens_of(engine, texts, out) for _ in range(4)]
        if rows[0] != rows[-1]:
            say("WRONG: graphs give other tokens than eager steps")
        return rows[-1]
    finally:
        engine.stop()


def bfloat16_errors(given: Any) -> dict[str, float]:
    """Teacher-forced logits of a text against float32: ours and transformers' own bf16."""
    import torch

    from nightherd.params import SamplingParams
    from worker.engine.cuda.graphs import GraphCache
    from worker.engine.interface import EngineRequest
    from worker.engine.scheduler import Span, StepPlan
    from worker.engine.sequence import Sequence

    device, end = given.device, 304 if given.dry else 500

    def sharp(dtype: str) -> Any:
        return random_model("T", dtype, device, 1024, initializer_range=0.1)

    text = prompts(1, end, 8192)[0]
    ids = torch.tensor([text], device=device)
    with torch.inference_mode():
        exact = sharp("bfloat16").float()(ids).logits[0]
        model = sharp("bfloat16")
        theirs = model(ids).logits[0].float()
    runner = make_runner(model, sequences=4, rows=512, context=1024)
    # A graph would not call `watched`.
    runner._graphs = GraphCache(None)
    runner.make_cache(20)
    seen: list[Any] = []
    forward = runner._model.forward

    def watched(*given: Any) -> Any:
        seen.append(forward(*given).float().clone())
        return seen[-1]

    runner._model.forward = watched
    sequence = Sequence(EngineRequest(tuple(text), SamplingParams(temperature=0.0), (0,), 1), 0, 0)
    sequence.block_ids = list(range(3, 11))
    # A prefill, a second one after a cached prefix, then one position at a time.
    whole = sequence.token_ids
    for start, stop in ((0, 100), (100, 300), *((p, p + 1) for p in range(300, end))):
        sequence.token_ids = whole[:stop]
        runner.execute(StepPlan([Span(sequence, start, stop - start)]))
    positions = [99, 299, *range(300, end)]
    ours = torch.cat(seen)
    own, other = (ours - exact[positions]).abs(), (theirs - exact)[positions].abs()
    made = {
        "max_ratio": float(own.max() / other.max()),
        "mean_ratio": float(own.mean() / other.mean()),
        "rms": float(own.pow(2).mean().sqrt()),
    }
    say(f"bf16 errors over theirs: max {made['max_ratio']:.2f}, mean {made['mean_ratio']:.2f}")
    return made


def measure_steps(given: Any, made: Result) -> None:
    """Milliseconds of a decode step with every sequence at one length: graph, eager, least."""
    import torch

    from worker.engine.cuda.graphs import GraphCache

    batches = [int(batch) for batch in given.batches.split(",")]
    model = random_model(given.shape, "bfloat16", given.device, given.context)
    runner = make_runner(model, sequences=max(batches), rows=given.budget, context=given.context)
    made["engine"] = runner.name
    require_cuda(runner.name)
    shape, pages = SHAPES[given.shape], -(-given.length // runner.block_size)
    per_token = shape.kv_bytes_per_token(2)
    blocks = max(batches) * pages
    if given.device == "cuda":
        # Memory that fusing the weights has freed is still the allocator's.
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] - (12 << 30)
        blocks = min(blocks, free // (runner.block_size * per_token))
    runner.make_cache(int(blocks))
    made |= {"num_blocks": runner.num_blocks, "steps": []}
    made.save()
    for batch in batches:
        if batch * pages > blocks:
            say(f"batch {batch}: its KV cache does not fit")
            continue
        plan = decoding_plan(runner, batch, given.length)
        count = 2 if given.dry else 20
        times = {"graph": step_milliseconds(runner, plan, count)}
        captured = len(runner._graphs) > 0
        runner._graphs = GraphCache(None)
        times["eager"] = step_milliseconds(runner, plan, count)
        runner._graphs = GraphCache(capture_of(given.device))
        weights = shape.layer_weights + shape.output_weights
        reads = batch * given.length * per_token / made["copy_bytes_per_second"]
        least = 1e3 * reads + 1e3 * max(
            2 * batch * weights / made["matrix_flops"],
            2 * weights / made["copy_bytes_per_second"],
        )
        say(f"{given.shape} batch {batch} at {given.length}: graph {times['graph']:.2f} ms, "
            f"eager {times['eager']:.2f}, least {least:.2f} ({least / times['graph']:.0%}), "
            f"{batch / times['graph'] * 1e3:,.0f} tokens/s"
            f"{'' if captured else ': NO GRAPH WAS CAPTURED'}")  # fmt: skip
        piece = {"batch": batch, **times, "least": least, "captured": captured}
        made["steps"].append(piece)
        made.save()
        piece["where"] = profile_step(runner, plan)
        made.save()


def decoding_plan(runner: Any, batch: int, length: int) -> Any:
    """A plan of so many sequences, each at its last position."""
    from worker.engine.scheduler import Span, StepPlan

    pages, spans = -(-length // runner.block_size), []
    for row in range(batch):
        sequence = runner._dummy_sequence(length)
        sequence.block_ids = list(range(row * pages, (row + 1) * pages))
        spans.append(Span(sequence, length - 1, 1))
    return StepPlan(spans)


def step_milliseconds(runner: Any, plan: Any, count: int) -> float:
    """The time of a step, with the CPU one step behind as in the engine."""
    for _ in range(5):
        runner.execute(plan)
    synchronize()
    started = time.monotonic()
    last = runner.launch(plan)
    for _ in range(count - 1):
        following = runner.launch(plan)
        last()
        last = following
    last()
    return (time.monotonic() - started) / count * 1e3


def profile_step(runner: Any, plan: Any) -> dict[str, Any]:
    """Where the time of an eager step goes."""
    with profiled() as seen:
        runner.execute(plan)
    say(f"  {breakdown(seen)}")
    for name, seconds in seen["longest"][:8]:
        say(f"    {seconds * 1e6:8.0f} us {name}")
    return seen


if __name__ == "__main__":
    main()
