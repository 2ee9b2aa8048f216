"""What all scripts of this folder share: the card's facts and limits, models on it, the result."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

SHAPES: dict[str, dict[str, Any]] = {
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
        "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "vocab_size": 1000, "tie_word_embeddings": False, "initializer_range": 0.1,
    },
}  # fmt: skip


def options(describe: str | None, **defaults: Any) -> argparse.Namespace:
    """`--name value` for each default."""
    parser = argparse.ArgumentParser(description=(describe or "").partition("\n")[0])
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser.parse_args()


def config_of(shape: str, context: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def make_model(
    shape: str, dtype: str = "bfloat16", context: int = 2048, device: str = "cuda"
) -> Any:
    """A LLaMA with random weights, made on the card."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config_of(shape, context))
        # Angles are float32 in every precision, as from_pretrained leaves them.
        rotary = type(model.model.rotary_emb)
        torch.set_default_dtype(torch.float32)
        with torch.device(device):
            model.model.rotary_emb = rotary(config=model.config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def make_engine(model: Any, *, sequences: int, budget: int, context: int, **more: Any) -> Any:
    """An engine as a worker builds it."""
    import torch

    from worker.engine.build import EngineOptions, build_engine

    device = model.get_input_embeddings().weight.device
    return build_engine(
        model,
        vocab_size=model.config.vocab_size,
        context_length=context,
        device=device,
        available=int(torch.cuda.mem_get_info(device)[0]),
        library_folder=ROOT / "build" / "kernels",
        options=EngineOptions(max_batch=sequences, budget=budget, **more),
    )


def run_requests(engine: Any, requests: list[dict[str, Any]], **params: Any) -> float:
    """Seconds for requests of `prompt`, `out` and perhaps `samples`, at forced lengths."""
    from nightherd.params import SamplingParams
    from worker.engine.interface import EngineRequest

    sampling = SamplingParams(**{"temperature": 0.0, **params})
    started = time.monotonic()
    generations = [
        engine.add(
            EngineRequest(
                prompt_token_ids=tuple(request["prompt"]),
                params=sampling,
                seeds=tuple(range(request.get("samples", 1))),
                max_new_tokens=request["out"],
            )
        )
        for request in requests
    ]
    for generation in generations:
        for future in generation.futures:
            output = future.result()
            if output.finish_reason != "length":
                raise SystemExit(f"{output.finish_reason}: {output.error_message}")
    return time.monotonic() - started


def prompts(count: int, length: int, vocab: int, seed: int = 1) -> list[list[int]]:
    import random

    rng = random.Random(seed)
    return [rng.choices(range(3, vocab), k=length) for _ in range(count)]


def milliseconds(work: Callable[[], object], repeats: int = 20, calls: int = 1) -> float:
    """The median time of work on the card, between events, once it is warm.

    With several `calls` it is that of one of so many in a graph: launches from Python take longer
    than small kernels do.
    """
    import statistics

    import torch

    for _ in range(3):
        work()
    if calls > 1:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                work()
        work = graph.replay
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) / calls


def limits() -> dict[str, float]:
    """Bytes a second of a copy, read and written, and FLOP a second of a bf16 product."""
    import torch

    bytes_ = torch.empty(2, 2**32, dtype=torch.uint8, device="cuda").random_()
    copied = milliseconds(lambda: bytes_[0].copy_(bytes_[1]))
    left, right = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    product = milliseconds(lambda: left @ right)
    return {
        "copy_bytes_per_second": 2 * 2**32 / copied * 1e3,
        "matrix_flops": 2 * 8192**3 / product * 1e3,
    }


def linear_weights(shape: str) -> tuple[int, int]:
    """Weights of all layers' matrices, and of the output layer."""
    sizes = SHAPES[shape]
    hidden, wide = sizes["hidden_size"], sizes["intermediate_size"]
    query = sizes["num_attention_heads"] * sizes["head_dim"]
    kv = sizes["num_key_value_heads"] * sizes["head_dim"]
    layer = hidden * (2 * query + 2 * kv) + 3 * hidden * wide
    return sizes["num_hidden_layers"] * layer, hidden * sizes["vocab_size"]


def floor(shape: str, prompt: int, out: int, batch: int, rates: dict[str, float]) -> float:
    """Seconds that one request takes at least: its matrices, its reads of the KV cache, its share
    of the weights' reads, one after the other (the serial floor)."""
    layers, output = linear_weights(shape)
    sizes = SHAPES[shape]
    flops = 2 * ((prompt + out) * layers + out * output)
    per_token = 4 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"]
    read = out * (prompt + out / 2) * per_token
    del batch  # from about 190 rows on the weights' reads hide behind the products
    # A copy reads and writes: its rate is that of bytes moved.
    return flops / rates["matrix_flops"] + read / rates["copy_bytes_per_second"]


@contextmanager
def result(name: str, given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A dict to fill; printed as the last line and written to $OUT, also after a failure."""
    import torch
    import transformers

    made: dict[str, Any] = {
        "script": name,
        "options": vars(given),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    if torch.cuda.is_available():
        import triton

        made |= {"card": torch.cuda.get_device_name(), "triton": triton.__version__}
    try:
        yield made
    except BaseException as error:
        made["failed"] = f"{type(error).__name__}: {error}"
        raise
    finally:
        if torch.cuda.is_available():
            made["peak_bytes"] = int(torch.cuda.max_memory_reserved())
        folder = Path(os.environ.get("OUT", ROOT / "build" / "gpu"))
        folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(made)
        (folder / f"{name}.json").write_text(line)
        print(line, flush=True)


def say(line: str) -> None:
    print(line, flush=True)
