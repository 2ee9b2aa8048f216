"""For `kernels.py`: what the conftest.py of those tests gives, without the needs of others."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")
