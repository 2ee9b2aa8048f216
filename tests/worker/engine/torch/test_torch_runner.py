"""The plain torch runner against transformers, and its batch invariance."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from tests.checkpoints import tiny_llama
from tests.engines import PROMPTS, VOCAB, ask
from worker.engine.block_manager import BlockManager
from worker.engine.interface import EngineRequest
from worker.engine.model.weights import shape_of
from worker.engine.runner import ModelRunner
from worker.engine.scheduler import Scheduler, Span, StepPlan
from worker.engine.sequence import Sequence as Sample
from worker.engine.torch import attention, torch_runner
from worker.engine.torch.torch_runner import TorchRunner

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
LONG = tuple(random.Random(3).choices(range(2, VOCAB), k=150))


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def runner_of(model: Any, *, block_size: int = 32, positions: int = 2048) -> TorchRunner:
    return TorchRunner(
        model, vocab_size=VOCAB, num_blocks=positions // block_size, block_size=block_size
    )


def drive(
    runner: TorchRunner,
    requests: Sequence[EngineRequest],
    *,
    budget: int = 64,
    max_sequences: int = 16,
    num_blocks: int | None = None,
    preempt: random.Random | None = None,
    best: dict[int, list[float]] | None = None,
) -> list[list[int]]:
    """What each request's first sample generates, without regard to ends of sequence; `best` gets
    the greatest logits that they were chosen by, under each one's seed."""
    blocks = BlockManager(num_blocks or runner.num_blocks, runner.block_size)
    scheduler = Scheduler(blocks, max_sequences=max_sequences, budget=budget)
    samples = [Sample(request, 0, order) for order, request in enumerate(requests)]
    for sample in samples:
        scheduler.add(sample)
    while not scheduler.idle:
        plan = scheduler.plan()
        assert plan.spans
        choosing = [span.sequence for span in plan.spans if span.chooses]
        choices = runner.execute(plan)
        scheduler.advance(plan)
        if best is not None:
            for sample, value in zip(choosing, choices.best, strict=True):
                best.setdefault(sample.request.seeds[0], []).append(value)
        ended = []
        for sample, token in zip(choosing, choices.token_ids, strict=True):
            sample.token_ids.append(token)
            if sample.generated == sample.request.max_new_tokens:
                ended.append(sample)
                runner.forget(sample)
        scheduler.remove(ended)
        scheduler.check()
        if preempt is not None and preempt.random() < 0.1 and scheduler.running:
            scheduler._preempt(preempt.choice(scheduler.running))
    return [sample.token_ids[sample.prompt_length :] for sample in samples]


def generated(model: Any, prompts: Sequence[tuple[int, ...]], count: int) -> list[list[int]]:
    """Greedy, by transformers alone, unbatched, without the ids that pad the vocabulary."""
    out = []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=count,
            pad_token_id=0,
            eos_token_id=None,
            suppress_tokens=list(range(VOCAB, model.config.vocab_size)),
        )
        out.append(ids[0, len(prompt) :].tolist())
    return out


def with_biases(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def qwen(kind: str, **changes: Any) -> Any:
    """A random Qwen2 or Qwen3 in float32, its biases and norms of the heads random too."""
    import transformers

    torch.manual_seed(2)
    settings = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        **changes,
    }
    if kind == "qwen2":
        return with_biases(
            transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings)).eval()
        )
    config = transformers.Qwen3Config(head_dim=32, attention_bias=True, **settings)
    model = with_biases(transformers.Qwen3ForCausalLM(config).eval())
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, mean=2.0, std=0.5)
    return model


MODELS: dict[str, Any] = {
    "plain": tiny_llama,
    "many heads to one": lambda: tiny_llama(num_attention_heads=8, num_key_value_heads=1),
    "a head each": lambda: tiny_llama(num_key_value_heads=4),
    "a group of three": lambda: tiny_llama(
        hidden_size=96, num_attention_heads=6, num_key_value_heads=2
    ),
    "a group of 24": lambda: tiny_llama(
        hidden_size=96, num_attention_heads=24, num_key_value_heads=1, head_dim=8
    ),
    "wide heads": lambda: tiny_llama(head_dim=64),
    "biases": lambda: with_biases(tiny_llama(attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: qwen("qwen2"),
    "qwen3": lambda: qwen("qwen3"),
    **{
        name: lambda rope=rope: tiny_llama(rope_parameters={"rope_theta": 10000.0, **rope})
        for name, rope in ROPES.items()
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_transformers_greedy(name: str) -> None:
    model = MODELS[name]()
    prompts = [*PROMPTS, LONG]
    wanted = generated(model, prompts, 32)
    assert all(len(set(row)) >= 20 for row in wanted)
    runner = runner_of(model)
    typed: ModelRunner = runner
    got = drive(runner, [ask(prompt, max_new_tokens=32) for prompt in prompts])
    assert got == wanted
    assert typed.vocab_size == VOCAB


def test_without_packed_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = generated(tiny_llama(), [LONG], 32)
    monkeypatch.setattr(torch_runner, "_packing_works", lambda dtype: False)
    assert drive(runner_of(tiny_llama()), [ask(LONG, max_new_tokens=32)]) == wanted


def test_a_tied_embedding_is_shared() -> None:
    changes = {"tie_word_embeddings": True, "initializer_range": 0.5}
    wanted = generated(tiny_llama(**changes), PROMPTS, 8)
    runner = runner_of(tiny_llama(**changes))
    assert runner._output._weight.data_ptr() == runner._embedding.data_ptr()
    assert drive(runner, [ask(prompt, max_new_tokens=8) for prompt in PROMPTS]) == wanted


def test_a_mistake_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes the equalities worth having: each of these changes the tokens."""
    wanted = generated(tiny_llama(), PROMPTS[1:], 32)
    requests = [ask(prompt, max_new_tokens=32) for prompt in PROMPTS[1:]]
    for name, mistake in (
        ("_rotate", lambda heads, cos, sin: heads),
        ("_rms_norm", lambda rows, weight, eps: rows * weight),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(torch_runner, name, mistake)
            for got, row in zip(drive(runner_of(tiny_llama()), requests), wanted, strict=True):
                assert got != row


def test_weights_are_not_kept_twice() -> None:
    model = tiny_llama()
    runner = runner_of(model)
    matrices = [part for part in model.model.layers.parameters() if part.ndim > 1 or not len(part)]
    assert len(matrices) == 7 * len(model.model.layers)
    assert sum(part.numel() for part in matrices) == 0
    cache = sum(cache.nbytes for cache in (*runner._attention._keys, *runner._attention._values))
    assert cache == 2 * 3 * 2 * 32 * 4 * 32 * runner.num_blocks
    runner.close()


# Batch invariance.


def hidden_rows(runner: TorchRunner, plan: StepPlan, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the last layer gives for each span, [count, hidden]."""
    seen = []
    forward = TorchRunner._forward

    def wrapped(self: TorchRunner, plan: StepPlan) -> torch.Tensor:
        seen.append(forward(self, plan))
        return seen[-1]

    with monkeypatch.context() as patched:
        patched.setattr(TorchRunner, "_forward", wrapped)
        runner.execute(plan)
    return list(seen[0][: plan.rows].split([span.count for span in plan.spans]))


def alone(runner: TorchRunner, tokens: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> Any:
    """All positions of a sequence in one step by itself, [positions, hidden]."""
    sample = Sample(ask(tokens), 0, 0)
    sample.block_ids = list(range(-(-len(tokens) // runner.block_size)))
    return hidden_rows(runner, StepPlan([Span(sample, 0, len(tokens))]), monkeypatch)[0]


WIDE = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "num_hidden_layers": 2}  # fmt: skip
INVARIANT = {
    "float32": (tiny_llama, torch.float32),
    "bfloat16": (tiny_llama, torch.bfloat16),
    "a group of three": (MODELS["a group of three"], torch.float32),
    "a group of three, bfloat16": (MODELS["a group of three"], torch.bfloat16),
    "one key-value head": (MODELS["many heads to one"], torch.float32),
    "a head each": (MODELS["a head each"], torch.float32),
    "wide": (lambda: tiny_llama(**WIDE), torch.float32),
    "wide, bfloat16": (lambda: tiny_llama(**WIDE), torch.bfloat16),
    "tied": (lambda: tiny_llama(tie_word_embeddings=True), torch.float32),
    "qwen3": (MODELS["qwen3"], torch.float32),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "threads"),
    [*((name, 2) for name in INVARIANT), ("wide", 1), ("bfloat16", 1)],
    indirect=["threads"],
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_row_is_batch_invariant(
    name: str, packed: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit: random chunks of prefills beside random decode rows, in random pages, all tiles
    together and one by one."""
    make, dtype = INVARIANT[name]
    if not packed:
        monkeypatch.setattr(torch_runner, "_packing_works", lambda dtype: False)
    runner = runner_of(make().to(dtype))
    rng = random.Random(11)
    texts = [
        rng.choices(range(VOCAB), k=length) for length in (1, 2, 15, 16, 17, 63, 64, 65, 130, 200)
    ]
    wanted = [alone(runner, text, monkeypatch) for text in texts]
    for scratch in (attention.SCRATCH_BYTES, 1):
        monkeypatch.setattr(attention, "SCRATCH_BYTES", scratch)
        pages = rng.sample(range(runner.num_blocks), runner.num_blocks)
        samples = [Sample(ask(text), 0, order) for order, text in enumerate(texts)]
        for sample in samples:
            sample.block_ids = [pages.pop() for _ in range(-(-sample.length // runner.block_size))]
        while any(sample.pending for sample in samples):
            due = [sample for sample in samples if sample.pending]
            spans = [
                Span(s, s.computed, min(s.pending, rng.choice([1, 1, 2, 16, 33, 90])))
                for s in rng.sample(due, rng.randint(1, len(due)))
            ]
            rows = hidden_rows(runner, StepPlan(spans), monkeypatch)
            for span, got in zip(spans, rows, strict=True):
                expected = wanted[span.sequence.order][span.start : span.start + span.count]
                assert torch.equal(got, expected), (span, (got - expected).abs().max())
                span.sequence.computed += span.count


@pytest.mark.parametrize("name", ["float32", "bfloat16", "tied"])
def test_tokens_are_invariant_to_batches_chunks_and_preemption(name: str, threads: int) -> None:
    """Sampled ones too, with penalties that must be counted again; and logits bit by bit."""
    make, dtype = INVARIANT[name]
    runner = runner_of(make().to(dtype))
    rng = random.Random(5)
    given: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 7, "repetition_penalty": 1.3},
        {"temperature": 0.7, "frequency_penalty": 0.5, "min_p": 0.02},
    ]
    prompts = [rng.choices(range(VOCAB), k=length) for length in (3, 40, 70, 17, 120)] * 2
    requests = [
        ask(prompt, seeds=(index,), max_new_tokens=24, **given[index % 5])
        for index, prompt in enumerate(prompts)
    ]
    exact: dict[int, list[float]] = {}
    wanted = [drive(runner, [request], budget=512, best=exact)[0] for request in requests]
    ways: list[dict[str, Any]] = [
        {"budget": 37},
        {"budget": 21, "num_blocks": 20},
        {"budget": 64, "preempt": rng},
    ]
    for way in ways:
        got: dict[int, list[float]] = {}
        assert drive(runner, requests, best=got, **way) == wanted
        assert got == exact
    assert drive(runner, requests[::-1], budget=512)[::-1] == wanted


def test_what_is_not_finite_stays_with_its_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence whose activations are NaN fails; those that later get its pages do not, and
    neither do its own earlier positions, which others may share."""
    model = tiny_llama()
    model.model.embed_tokens.weight.data[7] = torch.nan
    runner = runner_of(model)
    good = [3, 4, 5, 6, 8, 9, 10, 11, 12]
    wanted = alone(runner, good, monkeypatch)
    assert wanted.isfinite().all()
    rows = alone(runner, [*good, 7, 20], monkeypatch)
    assert torch.equal(rows[:9], wanted)
    assert rows[9:].isnan().all()
    assert torch.equal(alone(runner, good, monkeypatch), wanted)

    sample = Sample(ask((*good, 7)), 0, 0)
    other = Sample(ask(good), 0, 1)
    sample.block_ids, other.block_ids = [0], [1]
    choices = runner.execute(StepPlan([Span(sample, 0, 10), Span(other, 0, 9)]))
    assert choices.best[0] != choices.best[0]
    assert abs(choices.best[1]) < 1e6


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_not_finite_is_seen_by_later_positions_only(poison: float) -> None:
    shape = shape_of(tiny_llama())
    cache = attention.PagedAttention(shape, 2, 32, torch.float32, torch.device("cpu"))
    first, second = (Sample(ask(PROMPTS[2]), 0, order) for order in range(2))
    first.block_ids, second.block_ids = [0], [0]
    keys, values = torch.randn(2, 16, 2, 32)
    queries = torch.randn(16, 4, 32)
    values[5, 1, 3] = poison
    cache.prepare([Span(first, 0, 9)], 16)
    cache.write(0, keys, values)
    finite = cache.attend(0, queries)[:9].isfinite()
    assert finite[:5].all()
    # Those heads alone that have met it.
    assert finite[5:, :64].all()
    assert not finite[5:, 64:].any()
    cache.prepare([Span(second, 0, 4)], 16)
    cache.write(0, keys, values)
    assert cache.attend(0, queries).isfinite().all()


def test_bfloat16_is_as_near_to_float32_as_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher-forced: the error of all logits of a text, against those of float32."""
    ids = torch.tensor([list(LONG)])
    exact_model = tiny_llama().to(torch.bfloat16).float()
    theirs_model = tiny_llama().to(torch.bfloat16)
    with torch.no_grad():
        exact = exact_model(ids).logits[0]
        theirs = theirs_model(ids).logits[0].float()
    runner = runner_of(tiny_llama().to(torch.bfloat16))
    hidden = alone(runner, LONG, monkeypatch)
    normed = torch_runner._rms_norm(hidden, runner._norm, runner._shape.norm_eps)
    ours = runner._output(normed).float()
    error, limit = (ours - exact).pow(2).mean().sqrt(), (theirs - exact).pow(2).mean().sqrt()
    assert limit > 0
    assert error <= 1.5 * limit, (error, limit)


def test_a_step_may_choose_nothing() -> None:
    runner = runner_of(tiny_llama())
    sample = Sample(ask(LONG), 0, 0)
    sample.block_ids = list(range(10))
    assert runner.execute(StepPlan()).token_ids == []
    assert runner.execute(StepPlan([Span(sample, 0, 40)])).token_ids == []
