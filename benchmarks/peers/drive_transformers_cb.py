"""transformers' continuous batching. It has no way to ignore an end of sequence but none at all."""

from __future__ import annotations

import inspect
import time
from typing import Any

from driving import Task, task, torch_facts, transformers_model

_STALL = 600.0
"""Seconds without an answer after which it is given up: its thread can die in silence."""
_SAMPLE = 96
"""Requests by which settings are compared."""


def main(given: Task) -> None:
    import torch
    from transformers import __version__
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(given.threads)
    model = transformers_model(given, attn_implementation="sdpa")
    longest = [max(map(size, given.requests), default=0) for size in (_prompt, _out)]
    tried: dict[str, float | str] = {}
    best = candidates(given)
    if len(best) > 1:
        sample = [{**one, "out": min(one["out"], 64)} for one in given.requests[:_SAMPLE]]
        for candidate in list(best):
            speed = _speed(model, given, candidate, longest, sample)
            tried[candidate["name"]] = speed
            if isinstance(speed, str):
                best.remove(candidate)
        best.sort(key=lambda candidate: -float(tried[candidate["name"]]))
    if not best:
        raise SystemExit(f"no settings run: {tried}")
    batches = Batches(model, given, best[0], longest)
    settings = {"version": __version__, "tried": tried, **best[0]}
    try:
        given.measure(batches.generate, settings, lambda: torch_facts(given.device))
    finally:
        batches.close()


def candidates(given: Task) -> list[dict[str, Any]]:
    """Settings to choose among; on a CPU, or where an attention is named, one."""
    more = given.option("more", {})
    page = given.option("page_size", None)
    tokens = given.option("max_batch_tokens", None)
    attention = given.option("attention", None)
    if not given.device.startswith("cuda"):
        page, tokens = page or 32, tokens or 256
    common = {"page_size": page or 256, "max_batch_tokens": tokens, **more}
    if given.kv_bytes:
        size = common["page_size"] * given.kv_bytes_per_token
        common["num_blocks"] = max(1, given.kv_bytes // size)
    if attention is not None or not given.device.startswith("cuda"):
        return [{"name": "asked", "attention": attention or "sdpa", "config": common}]
    graphs = {"use_cuda_graph": True, "use_async_batching": True}
    found = [
        {"name": name, "attention": name, "config": common}
        for name in ("flash_attention_3", "flash_attention_2")
        if _installed(name)
    ]
    return [
        *found,
        {"name": "torch-flash", "attention": TORCH_FLASH, "config": {**common, **graphs}},
        {"name": "sdpa", "attention": "sdpa", "config": common},
    ]


TORCH_FLASH = "torch"
"""The path for flash attention, with torch's kernels in the place of a package's."""


def _installed(name: str) -> bool:
    from transformers.utils import import_utils

    known = getattr(import_utils, f"is_flash_attn_{name[-1]}_available", None)
    return bool(known is not None and known())


def _prompt(request: dict[str, Any]) -> int:
    return len(request["prompt"])


def _out(request: dict[str, Any]) -> int:
    return int(request["out"])


def _speed(
    model: Any, given: Task, candidate: dict[str, Any], longest: list[int], sample: list[Any]
) -> float | str:
    """Tokens a second of settings, or why they do not run."""
    import torch

    try:
        batches = Batches(model, given, candidate, longest)
        try:
            batches.generate(sample[:8])
            started = time.monotonic()
            tokens = sum(batches.generate(sample))
            return tokens / (time.monotonic() - started)
        finally:
            batches.close()
            torch.cuda.empty_cache()
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"[:200]


def _config(options: dict[str, Any]) -> Any:
    from transformers.generation import ContinuousBatchingConfig

    options = dict(options)
    if "page_size" not in inspect.signature(ContinuousBatchingConfig).parameters:
        # As it was called up to 5.17.
        options["block_size"] = options.pop("page_size")
    return ContinuousBatchingConfig(**options)


def use_torch_flash(model: Any) -> None:
    """Gives transformers torch's own flash attention as the package that it looks for."""
    from torch.nn.attention.varlen import varlen_attn
    from transformers import modeling_flash_attention_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}

    def flash_attn_varlen_func(
        q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
        max_seqlen_k: int, softmax_scale: float | None = None, causal: bool = True,
        window_size: Any = (-1, -1),
    ) -> Any:  # fmt: skip
        longest = int(max_seqlen_q), int(max_seqlen_k)
        given = (q, k, v, cu_seqlens_q, cu_seqlens_k, *longest)
        out = varlen_attn(*given, scale=softmax_scale, **options)
        return out[0] if isinstance(out, tuple) else out

    flash: Any = modeling_flash_attention_utils
    function = flash_attn_varlen_func
    flash._lazy_imports = lambda *args, **more: (
        *(function, function, None),
        *(flash._pad_input, flash._unpad_input),
    )
    flash._loaded_implementation = None
    # Up to 5.19 or so it has a name of its own.
    names = "paged|flash_attention_2", "flash_attention_2"
    model.config._attn_implementation = names["paged|sdpa" not in ALL_ATTENTION_FUNCTIONS]


class Batches:
    """A manager with given settings, started."""

    def __init__(
        self, model: Any, given: Task, candidate: dict[str, Any], longest: list[int]
    ) -> None:
        from transformers import GenerationConfig
        from transformers.generation.continuous_batching import utils

        if candidate["attention"] == TORCH_FLASH:
            use_torch_flash(model)
        else:
            model.set_attn_implementation(candidate["attention"])
        generation = GenerationConfig(
            do_sample=not given.greedy,
            max_new_tokens=given.context,
            eos_token_id=-1,
            pad_token_id=model.config.pad_token_id,
        )
        if not given.greedy:
            generation.temperature, generation.top_p = given.temperature, given.top_p
            generation.top_k = given.top_k
        hints = utils.WorkloadHints(
            max_prompt_length=longest[0],
            max_generated_length=longest[1],
            num_requests=len(given.requests),
        )
        self._used = 0
        self._manager = model.init_continuous_batching(
            generation_config=generation,
            continuous_batching_config=_config(candidate["config"]),
            workload_hints=hints,
        )
        if given.device.startswith("cuda"):
            self._manager.warmup()
        self._manager.start()

    def generate(self, requests: list[dict[str, Any]]) -> list[int]:
        manager = self._manager
        places = {}
        for place, request in enumerate(requests):
            name = f"request-{self._used}"
            self._used += 1
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

    def close(self) -> None:
        self._manager.stop(block=True, timeout=30)


if __name__ == "__main__":
    main(task())
