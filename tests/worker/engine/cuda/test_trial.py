"""Every kernel is tried against its reference before an engine relies on it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.checkpoints import tiny_llama
from tests.engines import VOCAB, ask
from worker.engine import cuda_kernels
from worker.engine.cuda_groups import Groups
from worker.engine.cuda_kernels import (
    GROUPS,
    SAMPLE,
    TRIALS,
    Case,
    KernelError,
    Kernels,
    fused_kernels,
    kernels_for,
)
from worker.engine.cuda_runner import CudaRunner
from worker.engine.scheduler import Plan, Span
from worker.engine.sequence import Sequence
from worker.engine.triton_kernels import reference
from worker.engine.weights import Shape

LOGGER = "nightherd.engine"
NAMES = [name for name in Kernels.__annotations__ if name != "lacks"]


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The devices that are current, innermost last."""
    devices: list[Any] = []

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        devices.append(wanted)
        yield
        devices.pop()

    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "device", device)
    return devices


def case_of(device: torch.device, dtype: torch.dtype = torch.float32, group: int = 4) -> Case:
    shape = Shape(
        layers=1,
        hidden=96,
        heads=2 * group,
        kv_heads=2,
        head_dim=64,
        intermediate=160,
        vocab_rows=500,
        context=512,
        norm_eps=1e-5,
    )
    return Case(shape, dtype, device, head_norms=True)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The references in the place of the fused ones, to be broken."""
    made = SimpleNamespace(
        **{name: getattr(reference, name) for name in NAMES}, lacks=frozenset[str]()
    )
    monkeypatch.setattr(cuda_kernels, "fused_kernels", lambda: made)
    return made


@pytest.mark.usefixtures("current")
@pytest.mark.parametrize(
    ("dtype", "group"), [(torch.bfloat16, 4), (torch.float32, 3), (torch.bfloat16, 1)]
)
def test_the_kernels_pass(
    dtype: torch.dtype, group: int, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    tried = kernels_for(case_of(device, dtype, group))
    assert tried.lacks == frozenset()
    assert not caplog.records
    fused = fused_kernels()
    assert all(getattr(tried, name) is getattr(fused, name) for name in NAMES)


def test_each_kernel_has_a_trial() -> None:
    assert {*NAMES, GROUPS} == set(TRIALS)


def test_they_are_tried_on_their_own_card(
    current: list[Any], kernels: SimpleNamespace, device: torch.device
) -> None:
    """Triton launches on the thread's current device, wherever its tensors are."""
    seen: list[str] = []

    def watched(name: str) -> Any:
        kernel = getattr(reference, name)

        def call(*given: Any, **more: Any) -> Any:
            seen.append(name)
            assert current == [device] or torch.cuda.is_available()
            return kernel(*given, **more)

        return call

    for name in NAMES:
        setattr(kernels, name, watched(name))
    kernels_for(case_of(device))
    assert set(seen) == set(NAMES)


def broken(name: str, how: str) -> Any:
    """A kernel that does not compile, or whose results are off."""
    kernel = getattr(reference, name)

    def call(*given: Any, **more: Any) -> Any:
        if how == "raises":
            raise RuntimeError("out of resource: shared memory\nRequired: 300000")
        out = kernel(*given, **more)
        for tensor in (out, *given, *more.values()):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.mul_(torch.nan if how == "is not finite" else 1.3)
        return out

    return call


@pytest.mark.usefixtures("current")
@pytest.mark.parametrize("how", ["raises", "is wrong", "is not finite"])
@pytest.mark.parametrize("name", ["rms_norm", "silu_mul", "mask_logits", "prefill_attention"])
def test_a_reference_takes_a_kernels_place(
    name: str,
    how: str,
    kernels: SimpleNamespace,
    device: torch.device,
    caplog: pytest.LogCaptureFixture,
) -> None:
    setattr(kernels, name, broken(name, how))
    with caplog.at_level(logging.WARNING, LOGGER):
        made = kernels_for(case_of(device))
    assert all(getattr(made, each) is getattr(reference, each) for each in NAMES)
    assert made.lacks == frozenset()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"the kernel {name} cannot be used here (")
    assert "plain torch" in record.getMessage()


@pytest.mark.usefixtures("current")
@pytest.mark.parametrize("how", ["raises", "is wrong"])
@pytest.mark.parametrize("name", ["decode_attention", "rotate_and_write"])
def test_without_these_there_is_no_going_on(
    name: str, how: str, kernels: SimpleNamespace, device: torch.device
) -> None:
    setattr(kernels, name, broken(name, how))
    with pytest.raises(KernelError, match=f"^{name}: "):
        kernels_for(case_of(device))


@pytest.mark.usefixtures("current")
def test_without_its_sampler_each_choice_is_waited_for(
    kernels: SimpleNamespace, device: torch.device
) -> None:
    kernels.sample = broken("sample", "raises")
    made = kernels_for(case_of(device))
    assert made.lacks == {SAMPLE}
    runner = runner_of(made)
    sequence = Sequence(ask((1, 2, 3)), 0, 0)
    sequence.block_ids = [0]
    assert not runner.runs_ahead(sequence)
    assert len(runner.execute(Plan([Span(sequence, 0, 3)])).token_ids) == 1


@pytest.mark.usefixtures("current")
def test_without_groups_rows_read_for_themselves(
    kernels: SimpleNamespace, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ungrouped(*given: Any, prefixes: Any = None, **more: Any) -> torch.Tensor:
        if prefixes is not None:
            raise RuntimeError("out of resource")
        return reference.decode_attention(*given, **more)

    kernels.decode_attention = ungrouped
    made = kernels_for(case_of(device))
    assert made.lacks == {GROUPS}
    runner = runner_of(made)

    def never(*given: Any) -> Groups:
        raise AssertionError("groups were looked for")

    monkeypatch.setattr(runner._prefixes, "groups", never)
    sequence = Sequence(ask((1, 2, 3)), 0, 0)
    sequence.block_ids = [0]
    runner.execute(Plan([Span(sequence, 0, 3)]))
    sequence.token_ids.append(5)
    assert len(runner.execute(Plan([Span(sequence, 3, 1)])).token_ids) == 1


def runner_of(kernels: Any) -> CudaRunner:
    runner = CudaRunner(
        tiny_llama(), kernels=kernels, vocab_size=VOCAB, max_sequences=4, max_rows=64, context=256
    )
    runner.make_cache(4)
    return runner
