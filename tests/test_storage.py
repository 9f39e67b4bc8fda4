"""Names of files and folders mean the same, whatever characters they have."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path

import pytest

from raysae.analysis.lab.subjects import find
from raysae.config import AnalysisConfig, ErrorsConfig, ModelConfig, SweepConfig, TextConfig, UserError
from raysae.lm import architecture, gguf
from raysae.lm.facts import model_folder
from raysae.lm.layout import Architecture, Block, Modules
from raysae.sae.importers import load_any
from raysae.sae.origins import is_of
from raysae.storage import inside, is_name, local_path, named, open_location, patterns, quoted
from raysae.study.plan import _check_errors
from raysae.text.sources import absolute_source, documents, local_files

ODD = ["my%20project", "a?b", "a b", "a,b[1]", "a#b", "a::b", "a*b", "[x]", "it's", 'a"b', "a$b", "~x"]


@pytest.fixture(params=ODD)
def odd(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a strange name, in which one works. Folders that its name matches as a glob lie beside it."""
    for name in ("ab", "a1", "a,b1", "x", "axb", request.param):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / request.param)
    return tmp_path / request.param


def test_files_are_found_in_folders_of_any_name(odd: Path) -> None:
    for name in ("x.txt", "y.txt"):
        (odd / name).write_text(name)
        for other in ("ab", "a1", "a,b1", "x", "axb"):
            (odd.parent / other / name).write_text("another")
    both = [odd / "x.txt", odd / "y.txt"]
    for source in (str(odd), f"{odd}/*.txt", f"{odd}/x.txt,{odd}/y.txt", "*.txt", "x.txt, y.txt", f"../{odd.name}"):
        assert local_files(source) == both, source
        again = ",".join(os.path.join(quoted(os.getcwd()), pattern) for pattern in patterns(source))
        os.chdir("/")
        assert local_files(again) == both, again
        os.chdir(odd)


def test_storage_in_folders_of_any_name(odd: Path) -> None:
    for study in ("s1", "s2"):
        (odd / study).mkdir()
        (odd / study / "config.yaml").write_text("")
        (odd.parent / "ab" / study).mkdir()
        (odd.parent / "ab" / study / "config.yaml").write_text("")
    files, path = open_location("output", str(odd))
    assert path == str(odd)
    assert inside(files, path, "*/config.yaml") == [f"{odd}/s1/config.yaml", f"{odd}/s2/config.yaml"]


def test_a_dataset_of_a_relative_file_is_read_from_any_folder(odd: Path) -> None:
    (odd / "x.jsonl").write_text('{"text": "hello"}\n')
    source = absolute_source("hf:json:x.jsonl")
    assert source == f"hf:json:{odd}/x.jsonl"
    os.chdir("/")
    if "::" in odd.name:  # The library takes it for two file systems within each other
        with pytest.raises(UserError, match="which cannot be loaded"):
            documents(TextConfig(source=source))
    else:
        assert list(documents(TextConfig(source=source))) == ["hello"]
    assert absolute_source("hf:owner/name@main") == "hf:owner/name@main"


def test_a_name_that_exists_stands_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "a", "b", "c[1]", "c1"):
        (tmp_path / name).write_text("")
    assert patterns("a,b") == ["a[,]b"], "the whole text is a file"
    assert patterns("a,b,c[1]") == ["a", "b", "c[[]1]"]
    assert patterns("c[12]") == ["c[12]"]
    assert patterns("no,such") == ["no", "such"]
    assert patterns(" , ") == []
    assert named("c[[]1]") == Path("c[1]")
    assert named("c*") is None


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/x", "a/b", "a\\b", ".hidden", "a\0", "a\n", "x" * 201, "a b"]
)
def test_what_could_leave_its_folder_is_no_name(name: str) -> None:
    assert not is_name(name)
    assert is_name("topk_w1024_k16_resid_post.2_lr0.001_s0")
    assert is_name("relu_w64_c1e+06_mlp_out.0_lr1e-05_s0")


def test_no_home_folder_is_told_with_the_knob() -> None:
    with pytest.raises(UserError, match=r"text\.cache is ~nobody-here/x, and there is no such home folder"):
        local_path("text.cache", "~nobody-here/x")


NOBODYS = "~nobody-here/x"


@pytest.mark.parametrize(
    "use",
    [
        lambda: model_folder(ModelConfig(name=NOBODYS)),
        lambda: load_any(NOBODYS, "resid_post.0"),
        lambda: _check_errors(SweepConfig(errors=ErrorsConfig(sae=NOBODYS, probe=NOBODYS)), "resid_post.0.error"),
        lambda: find(AnalysisConfig(sae=[NOBODYS])),
    ],
)
def test_every_use_of_a_path_without_its_home_folder_is_one_sentence(
    use: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=NOBODYS):
        use()


def test_a_model_without_its_home_folder_is_no_other_model() -> None:
    assert is_of("owner/other", NOBODYS) is False


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No HOME, and a user whom the system does not know, as in a container."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)


def test_without_a_home_folder_a_search_is_not_kept(
    homeless: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Architecture("blocks", (Block(),), 8, 16)
    monkeypatch.setattr(architecture, "_examine", lambda *arguments: found)
    config = tmp_path / "config.json"
    assert architecture.examined(ModelConfig(), config, {}, None, Modules("blocks")) == found
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_folder_a_gguf_file_is_refused(
    homeless: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.gguf").touch()
    monkeypatch.setattr(gguf, "find_spec", lambda package: True)
    monkeypatch.setattr(gguf, "version", lambda package: "1")
    with pytest.raises(UserError, match=r"the folder for unpacked \.gguf files is ~.*: set HOME"):
        gguf.unpacked(tmp_path / "a.gguf")
