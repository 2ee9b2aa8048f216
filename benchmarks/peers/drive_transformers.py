"""transformers' `generate` on static batches of requests in their order, padded on the left."""

from __future__ import annotations

from typing import Any

from driving import Task, task, torch_facts, transformers_model


def main(given: Task) -> None:
    import torch
    from transformers import __version__
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(given.threads)
    size = given.option("batch", 128 if given.device.startswith("cuda") else 32)
    model = transformers_model(given)
    pad = model.config.pad_token_id
    sampling = {"do_sample": False}
    if not given.greedy:
        sampling = {
            "do_sample": True,
            "temperature": given.temperature,
            "top_p": given.top_p,
            "top_k": given.top_k,
        }

    @torch.inference_mode()
    def batch(requests: list[dict[str, Any]]) -> list[int]:
        width = max(len(request["prompt"]) for request in requests)
        ids = torch.full((len(requests), width), pad)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            prompt = request["prompt"]
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        out = max(request["out"] for request in requests)
        made = model.generate(
            ids.to(given.device),
            attention_mask=mask.to(given.device),
            min_new_tokens=out,
            max_new_tokens=out,
            pad_token_id=pad,
            eos_token_id=pad,
            **sampling,
        )
        # A row goes on to the end of its batch; what it was asked for is what counts.
        return [min(made.shape[1] - width, request["out"]) for request in requests]

    def generate(requests: list[dict[str, Any]]) -> list[int]:
        lengths: list[int] = []
        for start in range(0, len(requests), size):
            lengths += batch(requests[start : start + size])
        return lengths

    given.measure(
        generate, {"version": __version__, "batch": size}, lambda: torch_facts(given.device)
    )


if __name__ == "__main__":
    main(task())
