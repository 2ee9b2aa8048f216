"""vLLM's offline interface."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from driving import Task, task, torch_facts


def main(given: Task) -> None:
    if given.option("preload", False):
        _preload()
    # In one process a step is a call; in two, as a server has it, they share the cores.
    apart = given.option("multiprocessing", False)
    cores = sorted(os.sched_getaffinity(0))[: given.threads]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if apart else "0",
        # By itself it would keep a core free, of two.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams
    from vllm import __version__ as version
    from vllm.sampling_params import StructuredOutputsParams

    settings: dict[str, Any] = {
        "max_num_seqs": given.option("max_num_seqs", 256),
        "enforce_eager": given.option("enforce_eager", False),
        "enable_prefix_caching": given.option("enable_prefix_caching", True),
    }
    budget = given.option("max_num_batched_tokens", None)
    if budget is not None:
        settings["max_num_batched_tokens"] = budget
    llm = LLM(
        str(given.checkpoint),
        dtype=given.dtype,
        max_model_len=given.context,
        kv_cache_memory_bytes=given.kv_bytes,
        seed=0,
        **settings,
    )
    structure = StructuredOutputsParams(json=given.schema) if given.schema else None

    def params(out: int) -> SamplingParams:
        # No seed a request: that makes it slower, and nothing here needs it.
        return SamplingParams(
            temperature=given.temperature,
            top_p=given.top_p,
            top_k=given.top_k,
            min_tokens=0 if structure else out,
            max_tokens=out,
            ignore_eos=True,
            detokenize=False,
            structured_outputs=structure,
        )

    def generate(requests: list[dict[str, Any]]) -> list[int]:
        outputs = llm.generate(
            [{"prompt_token_ids": request["prompt"]} for request in requests],
            [params(request["out"]) for request in requests],
            use_tqdm=False,
        )
        return [len(output.outputs[0].token_ids) for output in outputs]

    given.measure(
        generate,
        {"version": version, "multiprocessing": apart, **settings},
        lambda: torch_facts(given.device),
    )


def _preload() -> None:
    """Starts this driver again with Intel's OpenMP, which vLLM's manual recommends."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    if "LD_PRELOAD" not in os.environ:
        os.environ["LD_PRELOAD"] = str(library)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606 - itself


if __name__ == "__main__":
    main(task())
