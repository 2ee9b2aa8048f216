"""4. Ours beside transformers in one run: `generate` on static batches, continuous batching."""

from __future__ import annotations

import time
from typing import Any

from common import limits, make_engine, make_model, options, result, run_requests, say


def main() -> None:
    given = options(
        __doc__, shape="1B", requests=512, static_batch=64, static_requests=128,
        sequences=512, budget=8192, context=2048, kv_blocks=1024, page=256, batch_tokens=4096,
    )  # fmt: skip
    from workloads import workload

    with result(f"peers-{given.shape}", given) as made:
        made |= limits()
        requests = workload("W1", given.requests, None, None)  # type: ignore[arg-type]
        tokens = sum(request["out"] for request in requests)
        made["rates"] = rates = {}
        for name, run in (("static", static), ("continuous", continuous), ("ours", ours)):
            try:
                rates[name] = run(requests, tokens, given)
                say(f"{name}: {rates[name]:,.0f} tokens/s")
            except Exception as error:  # a peer that does not run is a result too
                made[f"{name}_failed"] = f"{type(error).__name__}: {error}"
                say(f"{name} failed: {error}")
        for name in ("static", "continuous"):
            if name in rates and "ours" in rates:
                made[f"ratio_to_{name}"] = rates["ours"] / rates[name]


def ours(requests: list[dict[str, Any]], tokens: int, given: Any) -> float:
    engine = make_engine(
        make_model(given.shape, context=given.context),
        sequences=given.sequences,
        budget=given.budget,
        context=given.context,
        prefix_cache=False,  # the same requests serve to warm up
    )
    engine.start()
    try:
        run_requests(engine, requests)
        run_requests(engine, requests)
        return tokens / run_requests(engine, requests)
    finally:
        engine.stop()


def static(requests: list[dict[str, Any]], tokens: int, given: Any) -> float:
    """In the order of arrival, padded on the left: each batch as long as its longest."""
    import torch

    model = make_model(given.shape, context=given.context)
    some = requests[: given.static_requests]

    @torch.inference_mode()
    def batch(part: list[dict[str, Any]]) -> None:
        width = max(len(request["prompt"]) for request in part)
        ids = torch.full((len(part), width), 2)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(part):
            ids[row, width - len(request["prompt"]) :] = torch.tensor(request["prompt"])
            mask[row, width - len(request["prompt"]) :] = 1
        out = max(request["out"] for request in part)
        model.generate(
            ids.cuda(), attention_mask=mask.cuda(), do_sample=False, eos_token_id=None,
            min_new_tokens=out, max_new_tokens=out, pad_token_id=2,
        )  # fmt: skip

    batch([{**request, "out": 4} for request in some[: given.static_batch]])
    torch.cuda.synchronize()
    started = time.monotonic()
    for first in range(0, len(some), given.static_batch):
        batch(some[first : first + given.static_batch])
    torch.cuda.synchronize()
    return sum(request["out"] for request in some) / (time.monotonic() - started)


def continuous(requests: list[dict[str, Any]], tokens: int, given: Any) -> float:
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    model = make_model(given.shape, context=given.context)
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=given.context, eos_token_id=-1, pad_token_id=2
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=given.page, num_blocks=given.kv_blocks, max_batch_tokens=given.batch_tokens
        ),
    )

    def run(some: list[dict[str, Any]], name: str) -> None:
        for place, request in enumerate(some):
            manager.add_request(
                input_ids=request["prompt"],
                request_id=f"{name}-{place}",
                max_new_tokens=request["out"],
            )
        left, heard = len(some), time.monotonic()
        while left:
            output = manager.get_result(timeout=1)
            if output is not None and (output.is_finished() or output.error):
                if output.error:
                    raise RuntimeError(output.error)
                left, heard = left - 1, time.monotonic()
            elif not manager.is_running() or time.monotonic() - heard > 120:
                raise RuntimeError(f"it stopped with {left} requests to go")

    manager.start()
    try:
        run([{**request, "out": 8} for request in requests[:64]], "warm")
        started = time.monotonic()
        run(requests, "run")
        return tokens / (time.monotonic() - started)
    finally:
        manager.stop(block=True, timeout=30)


if __name__ == "__main__":
    main()
