"""The engine's throughput: 512 prompt and 256 output tokens, or prompts with many samples each."""

from __future__ import annotations

from typing import Any

from common import (
    SHAPES,
    Result,
    breakdown,
    facts,
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

from worker.engine.cuda import groups


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
        groups.MIN_GROUP_ROWS = 1 << 30
        name += "-ungrouped"
    with result(name, given) as made:
        made |= limits()
        made.save()
        model = random_model(given.shape, given.dtype, given.device, given.context)
        engine = make_engine(
            model, sequences=given.sequences, budget=given.budget, context=given.context
        )
        engine.start()
        try:
            measure(given, engine, model.config.vocab_size, made)
        finally:
            engine.stop()


def measure(given: Any, engine: Any, vocab: int, made: Result) -> None:
    """Warms up, measures round after round, then profiles some more requests."""
    # All sizes of a batch come more than twice, so that their graphs are captured; some prompts
    # are as long as those that are measured, so that their steps have as many splits.
    long, short = (
        prompts(3 * given.sequences, length, vocab, seed=2) for length in (given.prompt, 20)
    )
    warm = [
        {"prompt": (short if index % 8 else long)[index],
         "out": 8 + index * 64 // given.sequences}
        for index in range(3 * given.sequences)
    ]  # fmt: skip
    made["warm_seconds"] = run_requests(engine, warm)
    made |= facts(engine)
    made.save()
    say(f"warm after {made['warm_seconds']:.1f} s: {made['num_blocks']:,} blocks, "
        f"{made['graphs']} graphs")  # fmt: skip
    made["warm_preemptions"] = made["preemptions"]
    made["rates"] = []
    tokens = given.requests * given.samples * given.out
    for number in range(given.rounds):
        requests = fresh_requests(given, vocab, number)
        steps = engine.stats().steps
        took = run_requests(engine, requests, temperature=given.temperature, top_p=given.top_p)
        made["rates"].append(tokens / took)
        made |= facts(engine)
        made["preemptions"] -= made["warm_preemptions"]
        made["floor"] = tokens / floor_seconds(given, requests, made)
        made["share_of_floor"] = max(made["rates"]) / made["floor"]
        made.save()
        say(f"round {number}: {tokens / took:,.0f} tokens/s, "
            f"{(engine.stats().steps - steps) / took:.0f} steps/s, "
            f"{made['preemptions']} preempted, "
            f"{made['share_of_floor']:.0%} of the floor of {made['floor']:,.0f}")  # fmt: skip
    if given.profile:
        requests = fresh_requests(given, vocab, given.rounds)[: given.profile]
        with profiled() as seen:
            run_requests(engine, requests, temperature=given.temperature)
        made["profile"] = seen
        say(breakdown(seen))


def fresh_requests(given: Any, vocab: int, number: int) -> list[dict[str, Any]]:
    """Requests whose prompts no other round has put into the prefix cache."""
    return [
        {"prompt": prompt, "out": given.out, "samples": given.samples}
        for prompt in prompts(given.requests, given.prompt, vocab, seed=10 + number)
    ]


def floor_seconds(given: Any, requests: list[dict[str, Any]], rates: dict[str, Any]) -> float:
    """Seconds of the serial floor; a prompt of many samples is computed once, read once a step."""
    alone = {**requests[0], "samples": 1}
    shape = SHAPES[given.shape]
    one = least_seconds("fixed", shape, [alone], rates)
    spared = shape.layer_weights * 2 * (given.prompt - 1) / rates["matrix_flops"]
    read = given.out * given.prompt * shape.kv_bytes_per_token(2) / rates["copy_bytes_per_second"]
    return float(len(requests) * (given.samples * one - (given.samples - 1) * (spared + read)))


if __name__ == "__main__":
    main()
