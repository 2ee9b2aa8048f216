"""The batch engine: batch invariance, and faults that fail their own requests alone."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import random
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import tiny_llama
from tests.engines import PROMPTS, VOCAB, admit_freely, ask, check, tokens, wait
from tests.worker.engine.test_tokens import MIXED
from worker.engine.cpu.level import levels_here
from worker.engine.engine import BatchEngine
from worker.engine.interface import EngineRequest, Grammar
from worker.engine.transformers.transformers_engine import TransformersEngine

Make = Callable[..., BatchEngine]
KINDS = (*levels_here(), "torch")


# The same tokens.


@pytest.mark.parametrize("kind", KINDS)
def test_it_samples_what_the_reference_samples(
    kind: str, batch_engines: Make, transformers_engines: Callable[..., TransformersEngine]
) -> None:
    requests = [ask(PROMPTS[index % len(PROMPTS)], **given) for index, given in enumerate(MIXED)]
    ours = tokens(batch_engines(kind=kind), *requests)
    assert ours == tokens(transformers_engines(), *requests)
    assert len(set(ours)) > 10


LAYOUTS: list[dict[str, Any]] = [
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1},
    {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 16},
    {"head_dim": 48, "attention_bias": True, "mlp_bias": True},
    {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 16},
    {"tie_word_embeddings": True},
    {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
        }
    },
    {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 8.0,
            "rope_theta": 5e5,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
]


@pytest.fixture(scope="module")
def doubtful() -> Iterator[list[int]]:
    """How many of each model's 20 requests part from transformers: of all, one in a hundred may."""
    counts: list[int] = []
    yield counts
    assert sum(counts) <= max(1, 20 * len(counts) // 100)


def agree(model: Any, make: Make, name: str) -> int:
    """20 greedy requests: a first difference from transformers only where the reference's two best
    logits are all but equal; returns how many have one."""
    rng = random.Random(name)
    prompts = [
        tuple(rng.randrange(2, VOCAB) for _ in range(rng.choice((1, 2, 17, 31, 32, 33, 64, 100))))
        for _ in range(20)
    ]
    got = tokens(
        make(model=model, vocab_size=512, budget=48),
        *[ask(prompt, max_new_tokens=24) for prompt in prompts],
    )
    parted = 0
    for prompt, row in zip(prompts, got, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *row]])).logits[0, len(prompt) - 1 : -1]
        best = logits.argmax(-1).tolist()
        for index, token in enumerate(row):
            if token != best[index]:
                assert float(logits[index].max() - logits[index, token]) < 1e-4
                parted += 1
                break
    # Sharp enough that a wrong computation would show.
    assert sum(len(set(row)) >= 12 for row in got) >= 15
    return parted


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("level", levels_here())
def test_it_agrees_with_transformers_in_every_layout(
    level: str, layout: dict[str, Any], batch_engines: Make, doubtful: list[int]
) -> None:
    make = functools.partial(batch_engines, kind=level)
    doubtful.append(agree(tiny_llama(**layout), make, str(layout)))


@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Qwen3"])
def test_it_agrees_with_transformers_on_kindred_architectures(
    name: str, batch_engines: Make, doubtful: list[int]
) -> None:
    """Qwen2 has biases on q, k and v, Qwen3 norms of queries and keys."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=512,
        max_position_embeddings=256,
        sliding_window=None,
        tie_word_embeddings=False,
        **sizes,
        **heads,
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases and norms that are not all alike
            torch.nn.init.normal_(parameter, 0.8, 0.2)
    doubtful.append(agree(model, batch_engines, name))


@pytest.mark.parametrize("level", levels_here())
@pytest.mark.parametrize(
    "shape",
    [
        {"head_dim": 32},
        {"head_dim": 48},
        # Inputs that fill none of the kernels' units.
        {"hidden_size": 112, "num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": 16,
         "intermediate_size": 210},
    ],
    ids=lambda shape: "-".join(map(str, shape.values())),
)  # fmt: skip
def test_bfloat16_is_as_near_to_float32_as_transformers(
    shape: dict[str, int], level: str, batch_engines: Make
) -> None:
    """Teacher-forced: the errors of the likeliest tokens' logprobs after each part of a text."""
    model = tiny_llama(**shape).bfloat16()
    ids = [2 + index * 37 % (VOCAB - 2) for index in range(70)]
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0, :, :VOCAB].float().log_softmax(-1)
        wide = copy.deepcopy(model).float()
        exact = wide(torch.tensor([ids])).logits[0, :, :VOCAB].log_softmax(-1)
    engine = batch_engines(model=model, kind=level)
    requests = [ask(ids[: end + 1], max_new_tokens=1, logprobs=20) for end in range(len(ids))]
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    for index, future in enumerate(engine.add(request).futures[0] for request in requests):
        (found,) = future.result(20).logprobs
        for top in found.top:
            wanted = float(exact[index, top.token_id])
            errors["ours"].append(top.logprob - wanted)
            errors["theirs"].append(float(theirs[index, top.token_id]) - wanted)
    ours, limit = (torch.tensor(errors[name]).pow(2).mean().sqrt() for name in ("ours", "theirs"))
    assert limit > 0
    assert ours <= 1.5 * limit, (ours, limit)
    if level not in ("amx", "avx512bf16"):
        # What is widened is computed in float32.
        assert ours < limit, (ours, limit)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def sharp(request: pytest.FixtureRequest) -> Any:
    return tiny_llama().to(request.param)


@pytest.mark.parametrize("level", levels_here())
def test_tokens_are_batch_invariant(level: str, sharp: Any, batch_engines: Make) -> None:
    """Alone, with others, in pieces, after preemption, by one thread or two, cached or not."""
    batch_engines = functools.partial(batch_engines, kind=level)
    alone: dict[int, tuple[int, ...]] = {}
    reference = batch_engines(model=sharp, max_batch=1, budget=256, prefix_cache=False)
    beginning = tuple(range(50, 120))
    pool = [
        ask(
            (*beginning[: index % 3 * 35], *PROMPTS[index % len(PROMPTS)], index + 2),
            max_new_tokens=4 + index % 20,
            seeds=(index,),
            **MIXED[index % 10],
        )
        for index in range(64)
    ]

    def wanted(index: int) -> tuple[int, ...]:
        if index not in alone:
            (alone[index],) = tokens(reference, pool[index])
        return alone[index]

    everything = batch_engines(model=sharp, max_batch=64, budget=256)
    assert tokens(everything, *pool) == [wanted(index) for index in range(64)]

    @settings(
        max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(
        indices=st.lists(st.integers(0, 63), min_size=2, max_size=24),
        max_batch=st.integers(1, 24),
        budget=st.integers(24, 200),
        blocks=st.integers(9, 40),
        threads=st.integers(1, 3),
        prefix_cache=st.booleans(),
        forecasts=st.booleans(),
    )
    def in_other_batches(indices: list[int], forecasts: bool, **given: Any) -> None:
        engine = batch_engines(model=sharp, **given)
        if not forecasts:
            admit_freely(engine.scheduler)
        assert tokens(engine, *[pool[index] for index in indices]) == [
            wanted(index) for index in indices
        ]
        check(engine)
        engine.stop()

    in_other_batches()


def test_preemption_happens_and_changes_nothing(batch_engines: Make) -> None:
    requests = [ask((3, 10 + index), max_new_tokens=60, temperature=1.0) for index in range(12)]
    wanted = tokens(batch_engines(), *requests)
    tight = batch_engines(blocks=9)
    admit_freely(tight.scheduler)
    assert tokens(tight, *requests) == wanted
    assert tight.scheduler.preemptions > 0
    check(tight)


class Digits:
    """A grammar of exactly three tokens out of ten."""

    def __init__(self) -> None:
        self.taken = 0

    def fill_mask(self, mask: Any) -> None:
        mask.fill(0)
        mask[0] = 0b1111111111 << 10

    def advance(self, token_id: int) -> bool:
        if not 10 <= token_id < 20:
            raise ValueError(f"{token_id} is no digit")
        self.taken += 1
        return self.taken == 3


class Stuck(Digits):
    def fill_mask(self, mask: Any) -> None:
        if self.taken:
            raise ValueError("nothing can follow")
        super().fill_mask(mask)


@pytest.mark.parametrize("kind", KINDS)
def test_grammars(kind: str, batch_engines: Make) -> None:
    engine = batch_engines(kind=kind)
    (free,) = tokens(engine, ask())

    def with_grammar(make: Callable[[], Grammar], **given: Any) -> EngineRequest:
        return ask(make_grammar=make, temperature=1.0, **given)

    requests = [with_grammar(Digits), with_grammar(Digits, max_new_tokens=2), with_grammar(Stuck)]
    whole, cut, stuck, plain = [engine.add(request) for request in (*requests, ask())]
    output = wait(whole)
    assert (len(output.token_ids), output.finish_reason) == (3, "stop")
    assert all(10 <= token < 20 for token in output.token_ids)
    assert (len(wait(cut).token_ids), wait(cut).finish_reason) == (2, "length")
    assert wait(stuck).error_code == "invalid_request"
    assert "leave no token" in (wait(stuck).error_message or "")
    assert wait(plain).token_ids == free


def test_twenty_thousand_small_requests_leave_nothing_behind(
    batch_engines: Make, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama(num_hidden_layers=1, hidden_size=32, intermediate_size=32, head_dim=16)
    engine = batch_engines(model=model, max_batch=64, budget=256, blocks=80)

    def run(count: int) -> None:
        handles = [
            engine.add(
                ask((3 + index % 90, index % 401), max_new_tokens=1 + index % 3, seeds=(index,))
            )
            for index in range(count)
        ]
        assert {wait(handle).finish_reason for handle in handles} == {"length"}

    run(2_000)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with caplog.at_level(logging.WARNING):
        for _ in range(9):
            run(2_000)
    check(engine)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000  # kB
    assert not caplog.records
