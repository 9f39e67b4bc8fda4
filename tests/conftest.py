"""Fixtures for every test. Ray's authentication is off and its usage statistics too; hub access is refused.

Ray must not connect by itself either: a thread that outlives its test's Ray and calls an actor would start another one, into which later tests fall.
"""

import os
import signal
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for tests/sae/test_cuda.py; read when Triton is first imported, by whatever test
os.environ.update(
    RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_AUTO_CONNECT="0", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
)

signal.signal(signal.SIGINT, signal.default_int_handler)  # drivers must hear Ctrl-C also where a shell's background job runs the tests

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and texts for tests; absent outside development machines."""
    if not SHARED_DATA.exists():
        pytest.skip(f"{SHARED_DATA} is not here: real models and texts for tests")
    return SHARED_DATA


@pytest.fixture(scope="session")
def stories_model(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"
