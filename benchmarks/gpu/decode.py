"""2. Whole decode steps: right tokens first, then graphs against eager steps, and their time."""

from __future__ import annotations

import itertools
from typing import Any

from common import limits, linear_weights, make_engine, make_model, options, prompts, result, say


def main() -> None:
    given = options(__doc__, shape="8B", context=2048, length=640, batches="1,16,64,256,512,1024")
    with result(f"decode-{given.shape}", given) as made:
        made["float32_tokens_equal"] = float32_tokens()
        made["bf16_error"] = bfloat16_errors()
        made |= limits()
        batches = [int(batch) for batch in given.batches.split(",")]
        made["steps"] = steps(given.shape, given.context, given.length, batches, made)


def float32_tokens() -> float:
    """Share of greedy tokens that equal transformers', float32, sharp weights, mixed lengths."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_model("tiny", "float32", 1024)
    texts = [prompts(1, length, 1000, length)[0] for length in (1, 5, 63, 64, 65, 200, 300, 700)]
    wanted = []
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([text], device="cuda")
            out = model.generate(ids, do_sample=False, max_new_tokens=64, eos_token_id=None,
                                 attention_mask=torch.ones_like(ids), pad_token_id=0)  # fmt: skip
            wanted.append(out[0, len(text) :].tolist())
    distinct = min(len(set(row[:32])) for row in wanted)
    got = greedy(model, texts, 64, 1024)
    pairs = list(zip(itertools.chain(*wanted), itertools.chain(*got), strict=True))
    share = sum(ours == theirs for ours, theirs in pairs) / len(pairs)
    say(f"float32: {share:.1%} of tokens equal, at least {distinct} distinct in 32")
    return share


def greedy(model: Any, texts: list[list[int]], out: int, context: int) -> list[list[int]]:
    from nightherd.params import SamplingParams
    from worker.engine.interface import EngineRequest

    engine = make_engine(model, sequences=64, budget=512, context=context, kv_memory=1 << 30)
    say(f"engine: {engine.name}")
    engine.start()
    try:
        rows = []
        for _ in range(4):  # from the third time on by graphs
            generations = [
                engine.add(EngineRequest(tuple(text), SamplingParams(temperature=0.0), (0,), out))
                for text in texts
            ]
            outputs = [generation.futures[0].result() for generation in generations]
            rows.append([list(output.token_ids) for output in outputs])
        if rows[0] != rows[-1]:
            say("WRONG: graphs give other tokens than eager steps")
        return rows[-1]
    finally:
        engine.stop()


def bfloat16_errors() -> dict[str, float]:
    """Teacher-forced logits of a text against float32: ours and transformers' own bf16."""
    import torch

    from nightherd.params import SamplingParams
    from worker.engine.cuda_model import kernels_for
    from worker.engine.cuda_runner import CudaRunner
    from worker.engine.interface import EngineRequest
    from worker.engine.scheduler import Plan, Span
    from worker.engine.sequence import Sequence

    text = prompts(1, 500, 1000)[0]
    ids = torch.tensor([text], device="cuda")
    with torch.inference_mode():
        exact = make_model("tiny", "bfloat16", 1024).float()(ids).logits[0]
        model = make_model("tiny", "bfloat16", 1024)
        theirs = model(ids).logits[0].float()
    runner = CudaRunner(model, kernels=kernels_for(ids.device), vocab_size=1000, max_sequences=4,
                        max_rows=512, context=1024)  # fmt: skip
    runner.make_cache(20)
    seen: list[Any] = []
    forward = runner._model.forward

    def watched(*given: Any) -> Any:
        seen.append(forward(*given).float().clone())
        return seen[-1]

    runner._model.forward = watched  # type: ignore[method-assign]
    sequence = Sequence(EngineRequest(tuple(text), SamplingParams(temperature=0.0), (0,), 1), 0, 0)
    sequence.block_ids = list(range(3, 11))
    # A prefill, a second one after a cached prefix, then one position at a time.
    whole = sequence.token_ids
    for start, end in ((0, 100), (100, 300), *((p, p + 1) for p in range(300, 500))):
        sequence.token_ids = whole[:end]
        runner.execute(Plan([Span(sequence, start, end - start)]))
    places = [99, 299, *range(300, 500)]
    ours = torch.cat(seen)[:, :1000]
    own, other = (ours - exact[places]).abs(), (theirs - exact)[places].abs()
    made = {
        "max_ratio": float(own.max() / other.max()),
        "mean_ratio": float(own.mean() / other.mean()),
        "rms": float(own.pow(2).mean().sqrt()),
    }
    say(f"bf16 errors over theirs: max {made['max_ratio']:.2f}, mean {made['mean_ratio']:.2f}")
    return made


def steps(
    shape: str, context: int, length: int, batches: list[int], rates: dict[str, Any]
) -> list[dict[str, float]]:
    """Milliseconds of a decode step with every sequence at `length`: graph, eager, least."""
    import time

    import torch

    from worker.engine.cuda_graphs import GraphCache, cuda_capture
    from worker.engine.cuda_model import kernels_for
    from worker.engine.cuda_runner import CudaRunner
    from worker.engine.scheduler import Plan, Span

    model = make_model(shape, context=context)
    device = model.get_input_embeddings().weight.device
    runner = CudaRunner(model, kernels=kernels_for(device), vocab_size=model.config.vocab_size,
                        max_sequences=max(batches), max_rows=8192, context=context,
                        capture=cuda_capture(device))  # fmt: skip
    config = model.config
    per_token = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    pages = -(-length // 64)
    free = torch.cuda.mem_get_info()[0] - (12 << 30)
    blocks = min(max(batches) * pages, free // (64 * per_token))
    runner.make_cache(int(blocks))
    made = []
    layers, output = linear_weights(shape)
    for batch in batches:
        if batch * pages > blocks:
            say(f"batch {batch}: its KV cache does not fit")
            continue
        spans = []
        for row in range(batch):
            sequence = runner._nobody(length)
            sequence.block_ids = list(range(row * pages, (row + 1) * pages))
            spans.append(Span(sequence, length - 1, 1))
        plan = Plan(spans)
        times = {}
        for kind in ("graph", "eager"):
            if kind == "eager":
                runner._graphs = GraphCache(None)
            for _ in range(5):
                runner.execute(plan)
            count = 20
            started = time.monotonic()
            last = runner.launch(plan)
            for _ in range(count - 1):
                following = runner.launch(plan)
                last()
                last = following
            last()
            times[kind] = (time.monotonic() - started) / count * 1e3
        runner._graphs = GraphCache(cuda_capture(device))
        flops = 2 * batch * (layers + output)
        read = batch * length * per_token
        weights = 2 * (layers + output)
        least = 1e3 * (
            max(flops / rates["matrix_flops"], weights / rates["copy_bytes_per_second"])
            + read / rates["copy_bytes_per_second"]
        )
        say(f"{shape} batch {batch} at {length}: graph {times['graph']:.2f} ms, "
            f"eager {times['eager']:.2f}, least {least:.2f} ({least / times['graph']:.0%}), "
            f"{batch / times['graph'] * 1e3:,.0f} tokens/s")  # fmt: skip
        made.append({"batch": batch, **times, "least": least})
    if made:
        profile(runner, plan)
    return made


def profile(runner: Any, plan: Any) -> None:
    """Where an eager step's time goes, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from worker.engine.cuda_graphs import GraphCache

    runner._graphs = GraphCache(None)
    with profiled(activities=[ProfilerActivity.CUDA]) as seen:
        runner.execute(plan)
    say(
        seen.key_averages().table(sort_by="cuda_time_total", row_limit=14, max_name_column_width=60)
    )


if __name__ == "__main__":
    main()
