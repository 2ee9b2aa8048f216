"""Every kernel is tested against its reference before an engine uses it."""

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
from worker.engine.cuda import kernel_selection
from worker.engine.cuda.cuda_runner import CudaRunner
from worker.engine.cuda.groups import Groups
from worker.engine.cuda.kernel_selection import (
    GROUPS,
    SAMPLE,
    TRIALS,
    CudaKernels,
    KernelError,
    TrialCase,
    fused_kernels,
    select_kernels,
)
from worker.engine.cuda.kernels import reference
from worker.engine.model.weights import Shape
from worker.engine.scheduler import Span, StepPlan
from worker.engine.sequence import Sequence

LOGGER = "nightherd.engine"
NAMES = [name for name in CudaKernels.__annotations__ if name != "missing"]


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


def case_of(device: torch.device, dtype: torch.dtype = torch.float32, group: int = 4) -> TrialCase:
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
    return TrialCase(shape, dtype, device, head_norms=True)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The references instead of the fused kernels; tests break them."""
    made = SimpleNamespace(
        **{name: getattr(reference, name) for name in NAMES}, missing=frozenset[str]()
    )
    monkeypatch.setattr(kernel_selection, "fused_kernels", lambda: made)
    return made


@pytest.mark.usefixtures("current")
@pytest.mark.parametrize(
    ("dtype", "group"), [(torch.bfloat16, 4), (torch.float32, 3), (torch.bfloat16, 1)]
)
def test_the_kernels_pass(
    dtype: torch.dtype, group: int, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    tried = select_kernels(case_of(device, dtype, group))
    assert tried.missing == frozenset()
    assert not caplog.records
    fused = fused_kernels()
    assert all(getattr(tried, name) is getattr(fused, name) for name in NAMES)


def test_each_kernel_has_a_trial() -> None:
    assert {*NAMES, GROUPS} == set(TRIALS)


def test_kernels_are_tested_on_their_own_card(
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
    select_kernels(case_of(device))
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
def test_a_reference_replaces_a_kernel(
    name: str,
    how: str,
    kernels: SimpleNamespace,
    device: torch.device,
    caplog: pytest.LogCaptureFixture,
) -> None:
    setattr(kernels, name, broken(name, how))
    with caplog.at_level(logging.WARNING, LOGGER):
        made = select_kernels(case_of(device))
    assert all(getattr(made, each) is getattr(reference, each) for each in NAMES)
    assert made.missing == frozenset()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"the kernel {name} cannot be used here (")
    assert "plain torch" in record.getMessage()


@pytest.mark.usefixtures("current")
@pytest.mark.parametrize("how", ["raises", "is wrong"])
@pytest.mark.parametrize("name", ["decode_attention", "rotate_and_write"])
def test_some_kernels_cannot_be_replaced(
    name: str, how: str, kernels: SimpleNamespace, device: torch.device
) -> None:
    setattr(kernels, name, broken(name, how))
    with pytest.raises(KernelError, match=f"^{name}: "):
        select_kernels(case_of(device))


@pytest.mark.usefixtures("current")
def test_without_the_sampling_kernel_no_step_overlaps(
    kernels: SimpleNamespace, device: torch.device
) -> None:
    kernels.sample = broken("sample", "raises")
    made = select_kernels(case_of(device))
    assert made.missing == {SAMPLE}
    runner = runner_of(made)
    sequence = Sequence(ask((1, 2, 3)), 0, 0)
    sequence.block_ids = [0]
    assert not runner.supports_overlap(sequence)
    assert len(runner.execute(StepPlan([Span(sequence, 0, 3)])).token_ids) == 1


@pytest.mark.usefixtures("current")
def test_without_the_prefix_kernel_no_groups_are_built(
    kernels: SimpleNamespace, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ungrouped(*given: Any, prefixes: Any = None, **more: Any) -> torch.Tensor:
        if prefixes is not None:
            raise RuntimeError("out of resource")
        return reference.decode_attention(*given, **more)

    kernels.decode_attention = ungrouped
    made = select_kernels(case_of(device))
    assert made.missing == {GROUPS}
    runner = runner_of(made)

    def never(*given: Any) -> Groups:
        raise AssertionError("groups were looked for")

    monkeypatch.setattr(runner._prefixes, "groups", never)
    sequence = Sequence(ask((1, 2, 3)), 0, 0)
    sequence.block_ids = [0]
    runner.execute(StepPlan([Span(sequence, 0, 3)]))
    sequence.token_ids.append(5)
    assert len(runner.execute(StepPlan([Span(sequence, 3, 1)])).token_ids) == 1


def runner_of(kernels: Any) -> CudaRunner:
    runner = CudaRunner(
        tiny_llama(), kernels=kernels, vocab_size=VOCAB, max_sequences=4, max_rows=64, context=256
    )
    runner.make_cache(4)
    return runner
