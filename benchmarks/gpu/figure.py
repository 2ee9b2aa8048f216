"""3. The engine at work: 512 prompt and 256 output tokens, or prompts with many samples each."""

from __future__ import annotations

from typing import Any

from common import (
    SHAPES,
    breakdown,
    least_seconds,
    limits,
    make_engine,
    options,
    profiled,
    prompts,
    random_model,
    result,
    run_requests,
    say,
)

from worker.engine import cuda_groups


def main() -> None:
    given = options(
        __doc__, {"requests": 3, "samples": 2, "prompt": 20, "out": 6, "sequences": 4, "budget": 64,
                  "context": 256, "profile": 2},
        shape="8B", requests=2048, samples=1, prompt=512, out=256, sequences=1024,
        budget=8192, context=2048, rounds=2, profile=256, temperature=0.0,
        top_p=1.0, dtype="bfloat16", groups=1,
    )  # fmt: skip
    name = f"figure-{given.shape}-{given.requests}x{given.samples}-{given.prompt}-{given.out}"
    if not given.groups:
        cuda_groups.LEAST_ROWS = 1 << 30
        name += "-ungrouped"
    with result(name, given) as made:
        made |= limits()
        model = random_model(given.shape, given.dtype, given.device, given.context)
        vocab = model.config.vocab_size
        engine = make_engine(
            model, sequences=given.sequences, budget=given.budget, context=given.context
        )
        made["engine"] = engine.name
        requests = [
            {"prompt": prompt, "out": given.out, "samples": given.samples}
            for prompt in prompts(given.requests, given.prompt, vocab)
        ]
        # Twice and more through all sizes of a batch, so that their graphs are there; some prompts
        # as long as the real ones, so that they are those of as many splits.
        long, short = (
            prompts(3 * given.sequences, length, vocab, seed=2) for length in (given.prompt, 20)
        )
        warm = [
            {"prompt": (short if place % 8 else long)[place],
             "out": 8 + place * 64 // given.sequences}
            for place in range(3 * given.sequences)
        ]  # fmt: skip
        engine.start()
        try:
            made["warm_seconds"] = run_requests(engine, warm)
            say(f"warm after {made['warm_seconds']:.1f} s")
            tokens = given.requests * given.samples * given.out
            made["rates"] = []
            for number in range(given.rounds):
                steps = engine.stats().steps
                took = run_requests(
                    engine, requests, temperature=given.temperature, top_p=given.top_p
                )
                made["rates"].append(tokens / took)
                say(f"round {number}: {tokens / took:,.0f} tokens/s, "
                    f"{(engine.stats().steps - steps) / took:.0f} steps/s")  # fmt: skip
                # What the round before left in the cache is none of this one's.
                requests = [
                    {**request, "prompt": prompt}
                    for request, prompt in zip(
                        requests,
                        prompts(given.requests, given.prompt, vocab, seed=10 + number),
                        strict=True,
                    )
                ]
            made["floor"] = tokens / least(given, requests, made)
            made["share_of_floor"] = max(made["rates"]) / made["floor"]
            say(f"floor {made['floor']:,.0f} tokens/s, reached {made['share_of_floor']:.0%}")
            if given.profile:
                with profiled() as seen:
                    run_requests(engine, requests[: given.profile], temperature=given.temperature)
                made["profile"] = seen
                say(breakdown(seen))
        finally:
            engine.stop()


def least(given: Any, requests: list[dict[str, Any]], rates: dict[str, Any]) -> float:
    """Seconds of the floor; a prompt with many samples is computed once, and read once a step."""
    alone = {**requests[0], "samples": 1}
    shape = SHAPES[given.shape]
    one = least_seconds("fixed", shape, [alone], rates)
    spared = shape.layer_weights * 2 * (given.prompt - 1) / rates["matrix_flops"]
    read = given.out * given.prompt * shape.kv_bytes_per_token(2) / rates["copy_bytes_per_second"]
    return len(requests) * (given.samples * one - (given.samples - 1) * (spared + read))


if __name__ == "__main__":
    main()
