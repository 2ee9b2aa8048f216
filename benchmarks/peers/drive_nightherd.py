"""nightherd's engine, built as a worker builds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from driving import Task, task, torch_facts, transformers_model


def main(given: Task) -> None:
    from nightherd.params import SamplingParams
    from worker.checkpoint.load import load_model
    from worker.checkpoint.memory import available
    from worker.engine.build import EngineOptions, build_engine
    from worker.engine.interface import EngineRequest

    options = {
        "kind": given.option("kind", "auto"),
        "budget": given.option("budget", None),
        "max_batch": given.option("max_batch", None),
        "prefix_cache": given.option("prefix_cache", True),
    }
    if given.random is None:
        model = load_model(given.checkpoint, given.device, given.dtype).model
    else:
        model = transformers_model(given)
    table = model.get_input_embeddings().weight
    engine = build_engine(
        model,
        vocab_size=len(table),
        context_length=given.context,
        device=table.device,
        available=available(table.device),
        library_folder=Path(given.cache) / "kernels",
        options=EngineOptions(kv_memory=given.kv_bytes or None, threads=given.threads, **options),
    )
    make_grammar = _grammar(given)
    names = ("temperature", "top_p", "top_k")
    params = SamplingParams(**{name: getattr(given, name) for name in names})

    def generate(requests: list[dict[str, Any]]) -> list[int]:
        handles = [
            engine.add(
                EngineRequest(
                    prompt_token_ids=tuple(request["prompt"]),
                    params=params,
                    seeds=(seed,),
                    max_new_tokens=request["out"],
                    make_grammar=make_grammar,
                )
            )
            for seed, request in enumerate(requests)
        ]
        outputs = [handle.futures[0].result() for handle in handles]
        for output in outputs:
            if output.finish_reason != "length":
                raise SystemExit(f"{output.finish_reason}: {output.error_message}")
        return [len(output.token_ids) for output in outputs]

    engine.start()
    try:
        given.measure(
            generate, {"engine": engine.name, **options}, lambda: torch_facts(given.device)
        )
    finally:
        engine.stop()


def _grammar(given: Task) -> Any:
    """Makes one grammar a sample; None where anything may come."""
    if given.schema is None:
        return None
    from nightherd.params import SamplingParams
    from nightherd.structured import structure_of
    from nightherd.text import TextProcessor
    from worker.text.grammar import GrammarMaker

    structure = structure_of(SamplingParams(structured_outputs={"json": given.schema}))
    if structure is None:
        return None
    text = TextProcessor.load(given.checkpoint, home=given.cache)
    return GrammarMaker(text).factory(structure, ignore_eos=True)


if __name__ == "__main__":
    main(task())
