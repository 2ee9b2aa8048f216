"""The tokens that the engines choose, against transformers alone and by hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from nightherd.params import SamplingParams
from nightherd.text import PROMPT_TAIL, TextProcessor
from tests.checkpoints import tiny_llama, write_text_files
from tests.engines import PROMPTS, VOCAB, ask, tokens, wait
from worker.engine.cpu.level import levels_here
from worker.engine.interface import Engine, RequestHandle
from worker.engine.transformers.batch_logits import BatchLogits, BatchRow
from worker.text.detokenizer import StopStringCheck, to_result

CPU = torch.device("cpu")


@pytest.fixture(params=["transformers", *levels_here(), "torch"])
def engines(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """All engines in turn: they must choose the same tokens."""
    if request.param == "transformers":
        plain_engines: Callable[..., Engine] = request.getfixturevalue("transformers_engines")
        return plain_engines
    made: Callable[..., Engine] = request.getfixturevalue("batch_engines")
    return functools.partial(made, kind=request.param)


def plain(model: Any, prompt: Sequence[int], count: int, **given: Any) -> tuple[int, ...]:
    """What transformers alone generates, unbatched; padded ids are left to chance."""
    config: Any = GenerationConfig
    out = model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        generation_config=config(
            do_sample=False, max_new_tokens=count, pad_token_id=0, eos_token_id=None, **given
        ),
    )
    return tuple(out[0, len(prompt) :].tolist())


def test_it_is_an_engine(engine: Engine) -> None:
    typed: Engine = engine
    assert typed.name in ("transformers", "cpu", "torch")


def test_greedy_is_transformers_greedy(model: Any, engines: Callable[..., Engine]) -> None:
    """Unbatched there, in one left-padded batch here."""
    engine = engines(vocab_size=512)
    wanted = [plain(model, prompt, 32) for prompt in PROMPTS]
    assert tokens(engine, *[ask(prompt, max_new_tokens=32) for prompt in PROMPTS]) == wanted
    # The checkpoint is sharp enough for that to say something.
    assert all(len(set(row)) >= 20 for row in wanted)


def test_a_wrong_model_would_be_seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes the equality above worth having: each of these mistakes changes the tokens."""
    wanted = [plain(model, prompt, 32) for prompt in PROMPTS]
    theta = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    for prompt, row in zip(PROMPTS, wanted, strict=True):
        assert plain(theta, prompt, 32) != row
    rotary = type(model.model.rotary_emb)
    forward = rotary.forward

    def no_rope(positions: torch.Tensor) -> torch.Tensor:
        return positions * 0

    def decode_off_by_one(positions: torch.Tensor) -> torch.Tensor:
        return positions + int(positions.shape[1] == 1)

    for mistake in (no_rope, decode_off_by_one):

        def wrong(self: Any, x: Any, position_ids: Any, mistake: Any = mistake) -> Any:
            return forward(self, x, mistake(position_ids))

        monkeypatch.setattr(rotary, "forward", wrong)
        # Shifting every position of a sequence changes nothing: the first prompt is one token.
        for prompt, row in zip(PROMPTS[1:], wanted[1:], strict=True):
            assert plain(model, prompt, 32) != row


def test_penalties_and_bad_words_are_those_of_transformers(
    model: Any, engines: Callable[..., Engine]
) -> None:
    engine = engines(vocab_size=512)
    prompt = PROMPTS[1]
    free = plain(model, prompt, 20)
    words = ((free[0],), (free[3], free[4]))
    got = tokens(
        engine,
        ask(prompt, max_new_tokens=20, repetition_penalty=1.4),
        ask(PROMPTS[4], max_new_tokens=20, repetition_penalty=1.4),
        ask(prompt, max_new_tokens=20, repetition_penalty=0.7),
        ask(prompt, max_new_tokens=20, bad_words=words),
    )
    assert got == [
        plain(model, prompt, 20, repetition_penalty=1.4),
        plain(model, PROMPTS[4], 20, repetition_penalty=1.4),
        plain(model, prompt, 20, repetition_penalty=0.7),
        plain(model, prompt, 20, bad_words_ids=[list(word) for word in words]),
    ]
    assert len({free, *got}) == 5


def test_the_repetition_penalty_spares_the_padding() -> None:
    rows = [
        BatchRow(RequestHandle(ask(prompt, repetition_penalty=2.0)), 0)
        for prompt in ((7, 9), (7,) * 6)
    ]
    logits = BatchLogits(rows, 6, 20, CPU)
    ids = torch.tensor([[0, 0, 0, 0, 7, 9, 3], [7] * 7])
    done = logits(ids, torch.ones(2, 24))  # type: ignore[arg-type]
    assert done.shape == (2, 20)
    assert (done == 0.5).nonzero().tolist() == [[0, 3], [0, 7], [0, 9], [1, 7]]


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"repetition_penalty": 1.5},
    {"presence_penalty": 2.0},
    {"frequency_penalty": 1.5, "temperature": 0.8},
    {"frequency_penalty": -1.0},
    {"logit_bias": {7: 100, 8: 99}, "temperature": 1.0},
    {"allowed_token_ids": [3, 4, 5, 6], "temperature": 1.0},
    {"bad_words": ((5,), (9, 33)), "temperature": 1.0},
    {"logprobs": 3, "temperature": 1.0},
    {"max_new_tokens": 3},
    {"seeds": (2**63 - 1,), "temperature": 1.0},
]


def test_each_row_has_its_own_parameters_in_any_batch(engine: Engine) -> None:
    requests = [ask(PROMPTS[index % len(PROMPTS)], **given) for index, given in enumerate(MIXED)]
    together = tokens(engine, *requests)
    alone = [tokens(engine, request)[0] for request in requests]
    assert together == alone
    assert tokens(engine, *reversed(requests)) == alone[::-1]
    assert [len(row) for row in together].count(3) == 1
    assert set(together[10]) <= {7, 8}
    assert set(together[11]) <= {3, 4, 5, 6}
    assert 5 not in together[12]


def test_seeds_decide(engine: Engine) -> None:
    first, second, other = tokens(
        engine,
        ask(temperature=1.0, seeds=(11,)),
        ask(temperature=1.0, seeds=(11,)),
        ask(temperature=1.0, seeds=(12,)),
    )
    assert first == second != other


def test_samples_of_a_request_are_as_requests_of_their_seeds(engine: Engine) -> None:
    seeds = (4, 5, 6)
    handle = engine.add(ask(temperature=1.0, seeds=seeds))
    outputs = [future.result(20).token_ids for future in handle.futures]
    assert outputs == tokens(engine, *[ask(temperature=1.0, seeds=(seed,)) for seed in seeds])
    assert len(set(outputs)) == 3


def test_presence_and_frequency_count_generated_tokens_alone(engine: Engine) -> None:
    """Checked against logits from log-probabilities: token by token, by hand."""
    prompt = PROMPTS[3]
    presence, frequency = 0.8, 0.6
    handle = engine.add(
        ask(
            prompt,
            presence_penalty=presence,
            frequency_penalty=frequency,
            logprobs=20,
            allowed_token_ids=list(range(20)),
            max_new_tokens=24,
        )
    )
    output = wait(handle)
    assert output.logprobs is not None
    seen: list[int] = []
    for token, position in zip(output.token_ids, output.logprobs, strict=True):
        by_hand = {
            each.token_id: each.logprob
            - frequency * seen.count(each.token_id)
            - presence * (each.token_id in seen)
            for each in (position.chosen, *position.top)
            if each.token_id < 20
        }
        assert by_hand[token] >= max(by_hand.values()) - 1e-4
        seen.append(token)
    assert max(seen.count(token) for token in seen) > 1


def test_padded_ids_are_never_chosen(model: Any, engines: Callable[..., Engine]) -> None:
    few = engines(vocab_size=40)
    for row in tokens(few, ask(PROMPTS[0]), *[ask(PROMPTS[0], temperature=50.0)] * 8):
        assert max(row) < 40


def test_a_temperature_too_small_to_divide_by_is_greedy(engine: Engine) -> None:
    tiny, greedy = tokens(engine, ask(temperature=1e-40), ask())
    assert tiny == greedy


def test_ends(engine: Engine) -> None:
    (free,) = tokens(engine, ask())
    index = next(i for i in range(3, 12) if free[i] not in free[:i])
    end = frozenset([free[index]])
    by_eos, by_stop, both = (
        wait(handle)
        for handle in [
            engine.add(ask(eos_token_ids=end)),
            engine.add(ask(stop_token_ids=end)),
            engine.add(ask(eos_token_ids=end, stop_token_ids=end)),
        ]
    )
    for output in (by_eos, by_stop, both):
        assert (output.token_ids, output.finish_reason) == (free[:index], "stop")
        assert 0 < output.started < output.finished
    assert by_eos.stop_reason is None
    assert both.stop_reason is None
    assert by_stop.stop_reason == free[index]

    long = wait(engine.add(ask(eos_token_ids=end, min_tokens=index + 1)))
    assert long.token_ids[:index] == free[:index]
    assert len(long.token_ids) > index
    assert long.token_ids[index] != free[index]


def test_an_end_that_the_vocabulary_lacks_never_comes(
    engines: Callable[..., Engine],
) -> None:
    engine = engines(pad_token_id=128_009)
    far = ask(eos_token_ids=frozenset([128_009]), min_tokens=4)
    assert tokens(engine, far, ask(PROMPTS[4]))[0] == tokens(engine, ask())[0]


def test_stop_strings_end_samples_in_their_middle(
    engines: Callable[..., Engine], tmp_path: Path
) -> None:
    """The engine, the checks and the final texts together."""
    text = TextProcessor.load(write_text_files(tmp_path))
    engine = engines(vocab_size=text.vocab_size)
    prompt = text.encode("the ship", True)
    given = SamplingParams(temperature=1.0, max_tokens=40)
    (free,) = tokens(engine, ask(prompt, temperature=1.0, max_new_tokens=40))
    whole = text.decode(free, prompt)
    for start in range(3, len(whole) - 4, 3):
        stop = whole[start : start + 4]
        params = given.model_copy(update={"stop": (stop,)})
        output = wait(
            engine.add(
                ask(
                    prompt,
                    temperature=1.0,
                    max_new_tokens=40,
                    make_stop_check=lambda stop=stop: StopStringCheck(
                        text, [stop], prompt_tail=prompt[-PROMPT_TAIL:]
                    ),
                )
            )
        )
        assert output.token_ids == free[: len(output.token_ids)]
        result = to_result(output, text, params, prompt[-PROMPT_TAIL:])
        if "\ufffd" not in stop:
            assert (result.text, result.finish_reason) == (whole[: whole.index(stop)], "stop")
            assert result.stop_reason == stop


def test_a_stop_check_is_fed_every_token_and_ends(engine: Engine) -> None:
    fed: list[list[int]] = []

    def make() -> Callable[[int], bool]:
        mine: list[int] = []
        fed.append(mine)

        def check(token: int) -> bool:
            mine.append(token)
            return len(mine) == 4

        return check

    handle = engine.add(ask(temperature=1.0, seeds=(1, 2), make_stop_check=make))
    outputs = [future.result(20) for future in handle.futures]
    assert [list(output.token_ids) for output in outputs] == fed
    for output in outputs:
        assert (len(output.token_ids), output.finish_reason, output.stop_reason) == (
            4,
            "stop",
            None,
        )


def test_logprobs(model: Any, engine: Engine) -> None:
    output = wait(engine.add(ask(temperature=1.0, logprobs=5, top_k=3, repetition_penalty=1.3)))
    assert output.logprobs is not None
    ids = torch.tensor([[*PROMPTS[1], *output.token_ids]])
    with torch.inference_mode():
        logits = model(ids).logits[0, len(PROMPTS[1]) - 1 : -1, :VOCAB]
    raw = logits.log_softmax(-1)
    for index, (token, position) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        assert position.chosen.token_id == token
        assert position.chosen.logprob == pytest.approx(float(raw[index, token]), abs=1e-3)
        assert len(position.top) == 5
        values = [each.logprob for each in position.top]
        assert values == sorted(values, reverse=True)
        assert position.top[0].token_id == int(raw[index].argmax())

    none, zero = (wait(engine.add(ask(logprobs=count))) for count in (None, 0))
    assert none.logprobs is None
    assert zero.logprobs is not None
    assert [position.top for position in zero.logprobs] == [()] * 12


def test_logprobs_are_a_distribution(engines: Callable[..., Engine]) -> None:
    few = engines(vocab_size=20)
    output = wait(few.add(ask((3, 4), logprobs=20, temperature=0.5, allowed_token_ids=[1, 2])))
    assert output.logprobs is not None
    for position in output.logprobs:
        assert sum(math.exp(each.logprob) for each in position.top) == pytest.approx(1, abs=1e-4)
