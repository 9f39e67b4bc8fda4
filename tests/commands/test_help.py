"""What `--help` prints."""

import pytest

from raysae.commands.help import help_text
from raysae.config import SweepConfig


@pytest.mark.parametrize("width", [100, 120])
def test_help_keeps_to_the_width(width: int):
    text = help_text(SweepConfig, "Trains SAEs.", {"--resume": {"metavar": "STUDY", "help": "go on"}}, width)
    assert max(map(len, text.splitlines())) <= width
    assert "  --resume STUDY" in text
