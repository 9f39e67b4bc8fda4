"""Fixtures for every test. Ray's authentication and usage statistics are off, and hub access is refused.

Ray must not connect by itself either. A thread that outlives its test's Ray and calls an actor would start another Ray.
Later tests would fall into it.
"""

import os
import signal
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Needed by tests/sae/test_cuda.py. Triton reads it when some test first imports Triton.
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_ENABLE_AUTO_CONNECT="0",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

# Drivers must hear Ctrl-C even where a shell's background job runs the tests
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and texts for tests. Only development machines have it."""
    if not SHARED_DATA.exists():
        pytest.skip(f"{SHARED_DATA} is not here: real models and texts for tests")
    return SHARED_DATA


@pytest.fixture(scope="session")
def stories_model(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"
