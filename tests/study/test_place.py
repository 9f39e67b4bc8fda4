"""Where a study may lie, and which of its paths become absolute."""

from pathlib import Path

import pytest

from raysae.config import SweepConfig, UserError
from raysae.study.place import check_writable, with_absolute_paths


@pytest.mark.parametrize("place", ["file", "file/runs"])
def test_an_output_that_cannot_be_written_is_refused_first(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=f"output is {tmp_path}/{place}, which cannot be written: {tmp_path}/file is a file"
    ):
        check_writable(SweepConfig(output=str(tmp_path / place)))
    check_writable(SweepConfig(output=str(tmp_path / "new/runs")))


def test_paths_are_absolute_except_of_what_travels_with_a_ray_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SweepConfig.model_validate({"model": {"name": "lm"}, "text": {"source": "a/*.txt, b.jsonl"}})
    here, job = tmp_path / "here", tmp_path / "_ray_pkg_1"
    for folder in (here, job):
        (folder / "lm").mkdir(parents=True)
    monkeypatch.chdir(here)
    found = with_absolute_paths(config)
    assert found.model.name == f"{here}/lm"
    assert found.text.source == f"{here}/a/*.txt,{here}/b.jsonl"
    assert found.output == f"{here}/runs"
    assert with_absolute_paths(SweepConfig()).model.name == "embedded"
    monkeypatch.chdir(job)
    found = with_absolute_paths(config)
    assert (found.model.name, found.text.source) == ("lm", "a/*.txt, b.jsonl")
    assert "_ray_pkg_" not in found.output
