"""OpenVINO GenAI's continuous batching, on GGUF made of the checkpoint.

Its GGUF reader takes neither bfloat16 nor float32: weights are stored as float16, and computed with
in float32 where that is asked for, else in what OpenVINO chooses for them on this CPU, unless
`--set openvino.precision=bf16` names a type.
"""

from __future__ import annotations

import json
from typing import Any

from driving import Task, task


def main(given: Task) -> None:
    import numpy as np
    import openvino as ov
    import openvino_genai as og
    from gguf_file import convert

    file = convert(given.checkpoint)
    precision = given.option("precision", "f32" if given.dtype == "float32" else None)
    settings = {
        "max_num_seqs": given.option("max_num_seqs", 64),
        "max_num_batched_tokens": given.option("max_num_batched_tokens", 256),
        "enable_prefix_caching": given.option("enable_prefix_caching", True),
    }
    scheduler = og.SchedulerConfig()
    scheduler.cache_size = max(1, round(given.kv_bytes / (1 << 30)))
    scheduler.dynamic_split_fuse = True
    for name, value in settings.items():
        setattr(scheduler, name, value)
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": given.threads}
    if precision is not None:
        properties["INFERENCE_PRECISION_HINT"] = precision
    pipeline = og.ContinuousBatchingPipeline(str(file), scheduler, "CPU", properties)

    def config(out: int) -> og.GenerationConfig:
        made = og.GenerationConfig()
        made.max_new_tokens = out
        made.ignore_eos = True
        made.apply_chat_template = False
        made.do_sample = not given.greedy
        if given.schema is None:
            made.min_new_tokens = out
        else:
            made.structured_output_config = og.StructuredOutputConfig(
                json_schema=json.dumps(given.schema)
            )
        if not given.greedy:
            made.temperature, made.top_p = given.temperature, given.top_p
            if given.top_k > 0:
                made.top_k = given.top_k
        return made

    used = 0

    def generate(requests: list[dict[str, Any]]) -> list[int]:
        nonlocal used
        handles = []
        for request in requests:
            ids = ov.Tensor(np.array([request["prompt"]], dtype=np.int64))
            handles.append(pipeline.add_request(used, ids, config(request["out"])))
            used += 1
        while pipeline.has_non_finished_requests():
            pipeline.step()
        return [sum(len(one.generated_ids) for one in handle.read_all()) for handle in handles]

    version = og.__version__
    given.measure(generate, {"version": version, "precision": precision, **settings})


if __name__ == "__main__":
    main(task())
