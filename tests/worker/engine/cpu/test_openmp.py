"""Teams of threads that torch computes with."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from tests.conftest import wait_until
from worker.engine.cpu import openmp


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_a_thread_that_has_loaded_a_model_keeps_no_team() -> None:
    counts: list[int] = []

    def load() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(4)
        try:
            counts.append(_threads())
            torch.ones(1 << 20).exp_()
            counts.append(_threads())
            assert openmp.end_team()
            wait_until(lambda: _threads() <= counts[0], seconds=5, what="the team's end")
            assert float(torch.ones(1 << 20).sum()) == 1 << 20, "a new team"
            openmp.end_team()
            counts.append(_threads())
        finally:
            torch.set_num_threads(before)

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert len(counts) == 3
    assert counts[1] == counts[0] + 3


def test_another_openmp_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_library = tmp_path / "libgomp.so.1"
    no_library.write_bytes(b"")
    monkeypatch.setattr(openmp, "_libraries", lambda: {str(no_library)})
    assert not openmp.end_team()
    monkeypatch.setattr(openmp, "_libraries", lambda: {"libc.so.6"})
    assert not openmp.end_team()
