"""transformers' continuous batching. It has no way to ignore an end of sequence but none at all."""

from __future__ import annotations

from typing import Any

from driving import Task, task, torch_facts

_STALL = 600.0
"""Seconds without an answer after which it is given up: its thread can die in silence."""


def main(given: Task) -> None:
    import time

    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, __version__
    from transformers.generation import ContinuousBatchingConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(given.threads)
    page = given.option("page_size", 256 if given.device.startswith("cuda") else 32)
    settings = {
        "page_size": page,
        "num_blocks": max(1, given.kv_bytes // (page * given.kv_bytes_per_token)),
        "max_batch_tokens": given.option("max_batch_tokens", 256),
        **given.option("more", {}),
    }
    model = AutoModelForCausalLM.from_pretrained(
        given.checkpoint,
        dtype=getattr(torch, given.dtype),
        attn_implementation=given.option("attention", "sdpa"),
    )
    model = model.to(given.device).eval()
    generation = GenerationConfig(
        do_sample=not given.greedy,
        max_new_tokens=given.context,
        eos_token_id=-1,
        pad_token_id=model.config.pad_token_id,
    )
    if not given.greedy:
        generation.temperature, generation.top_p = given.temperature, given.top_p
        generation.top_k = given.top_k
    manager = model.init_continuous_batching(
        generation_config=generation,
        continuous_batching_config=ContinuousBatchingConfig(**settings),
    )
    used = 0

    def generate(requests: list[dict[str, Any]]) -> list[int]:
        nonlocal used
        places = {}
        for place, request in enumerate(requests):
            name = f"request-{used}"
            used += 1
            places[name] = place
            manager.add_request(
                input_ids=request["prompt"], request_id=name, max_new_tokens=request["out"]
            )
        lengths = [0] * len(requests)
        heard = time.monotonic()
        while places:
            output = manager.get_result(timeout=1)
            if output is None:
                if not manager.is_running() or time.monotonic() - heard > _STALL:
                    raise SystemExit(f"it stopped with {len(places)} requests to go")
                continue
            if output.is_finished() or output.error:
                if output.error:
                    raise SystemExit(f"{output.request_id}: {output.error}")
                lengths[places.pop(output.request_id)] = len(output.generated_tokens)
            heard = time.monotonic()
        return lengths

    manager.start()
    try:
        given.measure(
            generate, {"version": __version__, **settings}, lambda: torch_facts(given.device)
        )
    finally:
        manager.stop(block=True, timeout=30)


if __name__ == "__main__":
    main(task())
