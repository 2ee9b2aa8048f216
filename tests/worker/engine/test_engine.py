"""The batch engine: the same tokens in any company, and faults that harm nobody else."""

from __future__ import annotations

import gc
import logging
import math
import random
import resource
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import tiny_llama
from tests.engines import PROMPTS, VOCAB, ask, tokens, wait
from tests.worker.engine.test_tokens import MIXED
from worker.engine.engine import BatchEngine
from worker.engine.interface import EngineRequest, Generation, Grammar
from worker.engine.reference import GenerateEngine
from worker.engine.runner import Choices, ModelRunner
from worker.engine.scheduler import Plan
from worker.engine.sequence import Sequence

Make = Callable[..., BatchEngine]


class FaultyRunner:
    """A runner that fails, or holds, when a step has what the test says."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.fail: Callable[[Plan], Exception | None] = lambda plan: None
        self.poison: int | None = None
        self.gone = False
        self.steps: list[int] = []
        self.hold_at: int | None = None
        self.reached, self.release = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def execute(self, plan: Plan) -> Choices:
        self.steps.append(len(plan.spans))
        if len(self.steps) == self.hold_at:
            self.reached.set()
            assert self.release.wait(20)
        error = self.fail(plan)
        if error is not None:
            raise error
        choices = self._runner.execute(plan)
        chosen = [span.sequence for span in plan.spans if span.chooses]
        for place, sequence in enumerate(chosen):
            if self.poison is not None and self.poison in sequence.token_ids:
                choices.best[place] = math.nan
        return choices

    def forget(self, sequence: Sequence) -> None:
        self._runner.forget(sequence)

    def lost(self) -> bool:
        return self.gone

    def close(self) -> None:
        self._runner.close()


@pytest.fixture
def faulty(batch_engines: Make) -> Callable[..., tuple[BatchEngine, FaultyRunner]]:
    """Makes engines on a runner with faults."""

    def make(**given: Any) -> tuple[BatchEngine, FaultyRunner]:
        made: list[FaultyRunner] = []

        def wrap(runner: ModelRunner) -> ModelRunner:
            made.append(FaultyRunner(runner))
            return made[0]

        return batch_engines(wrap=wrap, **given), made[0]

    return make


def has(token: int) -> Callable[[Plan], bool]:
    return lambda plan: any(token in span.sequence.token_ids for span in plan.spans)


def check(engine: BatchEngine) -> None:
    """Nothing leaked: once idle, every block is free."""
    deadline = threading.Event()
    for _ in range(400):
        if engine.scheduler.idle and not engine._samples:
            break
        deadline.wait(0.01)
    engine.scheduler.check()
    assert engine.scheduler.blocks.available == engine.scheduler.blocks.num_blocks
    assert engine._samples == {}


# The same tokens.


@pytest.mark.parametrize("kind", ["kernels", "torch"])
def test_it_samples_what_the_reference_samples(
    kind: str, batch_engines: Make, generate_engines: Callable[..., GenerateEngine]
) -> None:
    requests = [ask(PROMPTS[place % len(PROMPTS)], **given) for place, given in enumerate(MIXED)]
    ours = tokens(batch_engines(kind=kind), *requests)
    assert ours == tokens(generate_engines(), *requests)
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


def agree(model: Any, make: Make, name: str) -> None:
    """20 greedy requests: a first difference from transformers only where the reference's two best
    logits are all but equal."""
    rng = random.Random(name)
    prompts = [
        tuple(rng.randrange(2, VOCAB) for _ in range(rng.choice((1, 2, 17, 31, 32, 33, 64, 100))))
        for _ in range(20)
    ]
    got = tokens(
        make(model=model, vocab_size=512, budget=48),
        *[ask(prompt, max_new_tokens=24) for prompt in prompts],
    )
    doubtful = 0
    for prompt, row in zip(prompts, got, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *row]])).logits[0, len(prompt) - 1 : -1]
        best = logits.argmax(-1).tolist()
        for place, token in enumerate(row):
            if token != best[place]:
                assert float(logits[place].max() - logits[place, token]) < 1e-4
                doubtful += 1
                break
    assert doubtful <= 1
    # Sharp enough that a wrong computation would show.
    assert sum(len(set(row)) >= 12 for row in got) >= 15


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_agrees_with_transformers_in_every_layout(
    layout: dict[str, Any], batch_engines: Make
) -> None:
    agree(tiny_llama(**layout), batch_engines, str(layout))


@pytest.mark.parametrize("name", ["Mistral", "Qwen2", "Qwen3"])
def test_it_agrees_with_transformers_on_kindred_architectures(
    name: str, batch_engines: Make
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
    agree(model, batch_engines, name)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def sharp(request: pytest.FixtureRequest) -> Any:
    return tiny_llama().to(request.param)


def test_company_changes_nothing(sharp: Any, batch_engines: Make) -> None:
    """Alone, with others, in pieces, after preemption, by one thread or two, cached or not."""
    alone: dict[int, tuple[int, ...]] = {}
    reference = batch_engines(model=sharp, max_batch=1, budget=256, prefix_cache=False)
    beginning = tuple(range(50, 120))
    pool = [
        ask(
            (*beginning[: place % 3 * 35], *PROMPTS[place % len(PROMPTS)], place + 2),
            max_new_tokens=4 + place % 20,
            seeds=(place,),
            **MIXED[place % 10],
        )
        for place in range(64)
    ]

    def wanted(place: int) -> tuple[int, ...]:
        if place not in alone:
            (alone[place],) = tokens(reference, pool[place])
        return alone[place]

    everything = batch_engines(model=sharp, max_batch=64, budget=256)
    assert tokens(everything, *pool) == [wanted(place) for place in range(64)]

    @settings(
        max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(
        places=st.lists(st.integers(0, 63), min_size=2, max_size=24),
        max_batch=st.integers(1, 24),
        budget=st.integers(24, 200),
        blocks=st.integers(9, 40),
        threads=st.integers(1, 3),
        prefix_cache=st.booleans(),
    )
    def company(places: list[int], **given: Any) -> None:
        engine = batch_engines(model=sharp, **given)
        assert tokens(engine, *[pool[place] for place in places]) == [
            wanted(place) for place in places
        ]
        check(engine)
        engine.stop()

    company()


def test_preemption_happens_and_changes_nothing(batch_engines: Make) -> None:
    requests = [ask((3, 10 + place), max_new_tokens=60, temperature=1.0) for place in range(12)]
    wanted = tokens(batch_engines(), *requests)
    tight = batch_engines(blocks=9)
    assert tokens(tight, *requests) == wanted
    assert tight.scheduler.preemptions > 0
    check(tight)


# Isolation.


@pytest.mark.parametrize(
    ("error", "code"),
    [(ValueError("a kernel\nbroke"), "engine_error"), (MemoryError(), "out_of_memory")],
)
def test_one_poisonous_request_fails_alone(
    batch_engines: Make,
    faulty: Callable[..., tuple[BatchEngine, FaultyRunner]],
    error: Exception,
    code: str,
) -> None:
    requests = [ask((3, 10 + place), temperature=1.0) for place in range(8)]
    wanted = tokens(batch_engines(), *requests)
    engine, runner = faulty(start=False)
    poisoned = has(499)
    runner.fail = lambda plan: error if poisoned(plan) else None
    bad = engine.add(ask((499, 3)))
    good = [engine.add(request) for request in requests]
    engine.start()
    output = wait(bad)
    assert (output.finish_reason, output.error_code) == ("error", code)
    assert "\n" not in (output.error_message or "")
    assert [wait(generation).token_ids for generation in good] == wanted
    # All nine, half of them, and the half with it one by one.
    assert list(dict.fromkeys(runner.steps))[:3] == [9, 5, 1]
    check(engine)
    assert tokens(engine, requests[0]) == wanted[:1]


def test_a_failure_in_the_middle_costs_nobody_a_token(
    batch_engines: Make, faulty: Callable[..., tuple[BatchEngine, FaultyRunner]]
) -> None:
    requests = [
        ask((3, 10 + place), temperature=1.0, max_new_tokens=20, logprobs=1) for place in range(6)
    ]
    wanted = tokens(batch_engines(), *requests)
    engine, runner = faulty()
    runner.fail = lambda plan: RuntimeError("once") if len(runner.steps) in (7, 12) else None
    generations = [engine.add(request) for request in requests]
    outputs = [wait(generation) for generation in generations]
    assert [output.token_ids for output in outputs] == wanted
    assert all(output.logprobs and len(output.logprobs) == 20 for output in outputs)
    assert len(runner.steps) > 12
    check(engine)


def test_memory_that_is_enough_for_half_is_enough(
    batch_engines: Make, faulty: Callable[..., tuple[BatchEngine, FaultyRunner]]
) -> None:
    requests = [ask((3, 10 + place)) for place in range(8)]
    wanted = tokens(batch_engines(), *requests)
    engine, runner = faulty(start=False)
    runner.fail = lambda plan: (
        torch.OutOfMemoryError("x") if len(runner.steps) == 1 and len(plan.spans) > 4 else None
    )
    generations = [engine.add(request) for request in requests]
    engine.start()
    assert [wait(generation).token_ids for generation in generations] == wanted
    check(engine)


def test_logits_that_are_not_finite_fail_their_row_alone(
    faulty: Callable[..., tuple[BatchEngine, FaultyRunner]],
) -> None:
    engine, runner = faulty()
    good = ask((3, 4), temperature=0.8, top_p=0.9)
    wanted = tokens(engine, good)
    runner.poison = 77
    bad, fine = engine.add(ask((77, 4))), engine.add(good)
    assert "not finite" in (wait(bad).error_message or "")
    assert [wait(fine).token_ids] == wanted


@pytest.mark.parametrize("kind", ["kernels", "torch"])
def test_a_weight_that_is_no_number_fails_those_who_read_it(
    kind: str, model: Any, batch_engines: Make
) -> None:
    """Not by a stand-in: NaN comes out of the real kernels, for one token's embedding."""
    import copy

    broken = copy.deepcopy(model)
    broken.model.embed_tokens.weight.data[77] = math.nan
    good = [ask((3, 10 + place), temperature=1.0, max_new_tokens=30) for place in range(6)]
    wanted = tokens(batch_engines(kind=kind), *good)
    # So few blocks that those of the bad one are used again by the others.
    engine = batch_engines(model=broken, kind=kind, blocks=9, max_batch=4)
    for _ in range(3):
        bad = [engine.add(ask((5, 77, 4))), engine.add(ask((77,) * 40))]
        generations = [engine.add(request) for request in good]
        assert {wait(each).error_code for each in bad} == {"engine_error"}
        assert [wait(generation).token_ids for generation in generations] == wanted


def test_a_lost_device_aborts_and_says_so(
    faulty: Callable[..., tuple[BatchEngine, FaultyRunner]],
) -> None:
    engine, runner = faulty(start=False)
    runner.fail = lambda plan: RuntimeError("CUDA error: an illegal memory access")
    runner.gone = True
    generations = [engine.add(ask()) for _ in range(5)]
    engine.start()
    assert {wait(generation).finish_reason for generation in generations} == {"aborted"}
    assert engine.broken is not None
    assert wait(engine.add(ask())).finish_reason == "aborted"


def test_what_never_fits_fails_alone(batch_engines: Make) -> None:
    engine = batch_engines(blocks=2)
    large, grows, fine = (
        engine.add(ask(tuple(range(3, 103)))),
        engine.add(ask((3,), max_new_tokens=100)),
        engine.add(ask()),
    )
    for generation in (large, grows):
        output = wait(generation)
        assert (output.finish_reason, output.error_code) == ("error", "out_of_memory")
        assert "--kv-memory" in (output.error_message or "")
    assert wait(fine).finish_reason == "length"
    check(engine)


def test_abort_answers_at_once_and_frees_its_blocks(
    batch_engines: Make, faulty: Callable[..., tuple[BatchEngine, FaultyRunner]]
) -> None:
    requests = [ask((3, place), temperature=1.0, max_new_tokens=40) for place in (10, 11, 12)]
    wanted = tokens(batch_engines(), *requests)
    engine, runner = faulty(start=False)
    runner.hold_at = 6
    generations = [engine.add(request) for request in requests]
    engine.start()
    assert runner.reached.wait(20)
    waiting = engine.add(ask())
    engine.abort([generations[1], waiting])
    for aborted in (generations[1], waiting):
        assert aborted.futures[0].result(0).finish_reason == "aborted"
    assert not generations[0].futures[0].done()
    runner.release.set()
    assert [wait(generations[place]).token_ids for place in (0, 2)] == [wanted[0], wanted[2]]
    check(engine)


def test_stop_aborts_everything(faulty: Callable[..., tuple[BatchEngine, FaultyRunner]]) -> None:
    engine, runner = faulty(max_batch=2)
    runner.hold_at = 3
    generations = [engine.add(ask(max_new_tokens=100)) for _ in range(5)]
    assert runner.reached.wait(20)
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    for generation in generations:
        assert wait(generation).finish_reason == "aborted"
    runner.release.set()
    stopper.join(20)
    assert not stopper.is_alive()
    assert wait(engine.add(ask())).finish_reason == "aborted"


def test_stop_before_start_aborts_too(batch_engines: Make) -> None:
    engine = batch_engines(start=False)
    generation = engine.add(ask())
    engine.stop()
    assert wait(generation).finish_reason == "aborted"


def test_a_factory_that_raises_fails_its_row_alone(batch_engines: Make) -> None:
    def bad_factory() -> Any:
        raise RuntimeError("no check")

    def bad_check(token: int) -> bool:
        raise RuntimeError("no answer")

    engine = batch_engines()
    (wanted,) = tokens(engine, ask())
    requests = [
        ask(make_stop_check=bad_factory),
        ask(make_grammar=bad_factory),
        ask(make_stop_check=lambda: bad_check),
        ask(),
    ]
    first, second, third, fine = [engine.add(request) for request in requests]
    assert wait(first).error_message == "RuntimeError: no check"
    assert wait(second).error_message == "RuntimeError: no check"
    assert wait(third).error_message == "RuntimeError: no answer"
    assert wait(fine).token_ids == wanted


def test_many_threads_add_and_abort(batch_engines: Make) -> None:
    """Every sample gets exactly one answer, whatever the order."""
    engine = batch_engines(max_batch=7)
    generations: list[Generation] = []
    lock = threading.Lock()

    def work(number: int) -> None:
        for place in range(30):
            request = ask((3, number, place), temperature=1.0, max_new_tokens=1 + place % 5)
            generation = engine.add(request)
            with lock:
                generations.append(generation)
            if place % 3 == 0:
                engine.abort([generation])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reasons = [wait(generation).finish_reason for generation in generations]
    assert set(reasons) <= {"length", "aborted"}
    assert reasons.count("length") >= 80
    check(engine)


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


@pytest.mark.parametrize("kind", ["kernels", "torch"])
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
        generations = [
            engine.add(
                ask((3 + place % 90, place % 401), max_new_tokens=1 + place % 3, seeds=(place,))
            )
            for place in range(count)
        ]
        assert {wait(generation).finish_reason for generation in generations} == {"length"}

    run(2_000)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with caplog.at_level(logging.WARNING):
        for _ in range(9):
            run(2_000)
    check(engine)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8_000  # kB
    assert not caplog.records
