"""Whether the CUDA engine gives right tokens on the card, by graphs: the first stage that runs it.

An engine that fell back to torch, or that is wrong, is not worth measuring.
"""

from __future__ import annotations

from typing import Any

from common import (
    Result,
    Stopped,
    equal_share,
    facts,
    make_engine,
    options,
    prompts,
    random_model,
    result,
    say,
    tokens_of,
    transformers_tokens,
)

LENGTHS = (5, 64, 200)
"""Tokens of the prompts: less than a block, one block, several."""
MAX_REGRET = 0.5
"""Standard deviations of logits by which a token of ours may be less likely than the likeliest, in
bfloat16. Right kernels stay far below that, and a token drawn at random has nearly four."""


def main() -> None:
    given = options(
        __doc__, {"budget": 64, "context": 256}, shape="T", out=16, budget=512, context=1024
    )
    with result("smoke", given) as made:
        wrong = check_float32(given, made)
        made.save()
        wrong += check_bfloat16(given, made)
        for line in made["warnings"]:
            say(f"WARNING of the engine: {line}")
        if wrong:
            raise Stopped("; ".join(wrong))


def check_float32(given: Any, made: Result) -> list[str]:
    """What is wrong in float32: tokens against transformers', eagerly and by graphs."""
    model = _model(given, "float32")
    texts = _texts(model)
    wanted = 2 * transformers_tokens(model, texts, given.out)
    ours = _engine_tokens(given, model, texts, made)
    made["tokens_equal"] = equal_share(ours, wanted)
    say(f"float32: {made['tokens_equal']:.1%} of tokens equal transformers', "
        f"{made['graphs']} graphs, {made['num_blocks']} blocks")  # fmt: skip
    wrong = []
    if ours != wanted:
        wrong.append(f"float32 tokens differ from transformers': {_first_difference(ours, wanted)}")
    if not made["graphs"]:
        wrong.append("no graph was captured")
    return wrong


def check_bfloat16(given: Any, made: Result) -> list[str]:
    """What is wrong in bfloat16, which is what is measured. Tokens differ there where two are
    nearly as likely, so each of ours is compared with the likeliest after the same text in
    float32."""
    import torch

    found: dict[str, Any] = {}
    made["bfloat16"] = found
    model = _model(given, "bfloat16")
    texts = _texts(model)
    ours = _engine_tokens(given, model, texts, found)
    exact = _model(given, "bfloat16").float()
    regrets = []
    for text, tokens in zip(2 * texts, ours, strict=True):
        ids = torch.tensor([text + tokens], device=given.device)
        with torch.inference_mode():
            logits = exact(ids).logits[0, len(text) - 1 : -1]
        chosen = logits.gather(1, ids[0, len(text) :, None])[:, 0]
        regrets.append(float(((logits.amax(1) - chosen) / logits.std(1)).max()))
    found["regret"] = max(regrets)
    say(f"bfloat16: tokens at most {found['regret']:.2f} deviations below the likeliest")
    if found["regret"] < MAX_REGRET:
        return []
    return [f"a bfloat16 token is {found['regret']:.1f} deviations below the likeliest"]


def _model(given: Any, dtype: str) -> Any:
    """With weights so sharp that no two tokens are nearly as likely in float32."""
    return random_model(given.shape, dtype, given.device, given.context, initializer_range=0.1)


def _texts(model: Any) -> list[list[int]]:
    return [prompts(1, length, model.config.vocab_size, length)[0] for length in LENGTHS]


def _engine_tokens(given: Any, model: Any, texts: list[list[int]], found: Any) -> list[list[int]]:
    """The engine's tokens, twice: the second time by graphs and after cached prefixes. Its facts go
    to `found`."""
    engine = make_engine(
        model, sequences=64, budget=given.budget, context=given.context, kv_memory=1 << 30
    )
    engine.start()
    try:
        tokens = [row for _ in range(2) for row in tokens_of(engine, texts, given.out)]
        found.update(facts(engine))
        return tokens
    finally:
        engine.stop()


def _first_difference(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """Where tokens first differ."""
    for row, pair in enumerate(zip(ours, theirs, strict=True)):
        for index, (one, other) in enumerate(zip(*pair, strict=True)):
            if one != other:
                time = "by graphs" if row >= len(LENGTHS) else "at first"
                length = LENGTHS[row % len(LENGTHS)]
                return f"prompt of {length}, {time}, token {index}: {one}, theirs {other}"
    return "nowhere"


if __name__ == "__main__":
    main()
