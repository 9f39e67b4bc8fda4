"""An error of a library at a user's input is one sentence, and its traceback is in a file."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest

from raysae.borders import border, reason
from raysae.config import UserError


class StrangeError(Exception):
    pass


@pytest.mark.parametrize("error", [StrangeError, RuntimeError, KeyError, OSError, RecursionError, ImportError])
def test_an_error_of_any_class_names_field_value_reason_and_traceback(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(UserError) as caught, border("model.name", "x", "which cannot be loaded", "name another"):
        raise error("it broke.\nand more")
    told = str(caught.value)
    assert re.fullmatch(r"model\.name is x, which cannot be loaded \(.*it broke.*\): name another\. .*", told), told
    (log,) = tmp_path.iterdir()
    assert told.endswith(f". The traceback is in {log}")
    assert "Traceback" in log.read_text()
    assert "and more" in log.read_text()


def test_sentences_of_ours_and_interruptions_pass() -> None:
    with pytest.raises(UserError, match=r"^ours$"), border("f", "v", "x"):
        raise UserError("ours")
    with pytest.raises(KeyboardInterrupt), border("f", "v", "x"):
        raise KeyboardInterrupt


def test_where_no_file_can_be_written_the_sentence_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(UserError, match=r"^f is v, which fails \(ValueError\)$"), border("f", "v", "which fails"):
        raise ValueError


def test_a_reason_is_one_line() -> None:
    assert reason(ValueError("\n  first line:\nsecond")) == "first line"
    assert reason(KeyError()) == "KeyError"
