"""The digest of a weight file is that of all its bytes. A large file's is kept while the file is the same."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from raysae.lm import digests
from raysae.lm.digests import file_digest


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sparse file of 64 MiB, which counts as large, and caches of its own."""
    monkeypatch.setattr(digests, "LARGE", 1 << 20)
    monkeypatch.setattr(digests, "SETTLED", 0)
    monkeypatch.setattr(digests, "KEPT", str(tmp_path / "kept"))
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(64 << 20)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_edit_of_eight_kib_anywhere_changes_the_digest_of_a_large_file(large: Path) -> None:
    found = {file_digest(large)}
    for at in (5, 33_333_333, (64 << 20) - 8192):
        with large.open("r+b") as file:
            file.seek(at)
            file.write(b"\1" * 8192)
        assert file_digest(large) == sha256(large)
        found.add(file_digest(large))
    assert len(found) == 4


def test_an_edit_that_sets_the_time_stamp_back_is_seen(large: Path) -> None:
    before, times = file_digest(large), large.stat()
    with large.open("r+b") as file:
        file.write(b"\1")
    os.utime(large, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_digest(large) == sha256(large) != before


def test_a_large_file_is_read_once(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = file_digest(large)
    monkeypatch.setattr(digests, "_hashed", lambda path: pytest.fail("it is read again"))
    assert file_digest(large) == first


def test_a_file_that_has_just_changed_is_read_again(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED", 10**12)
    assert file_digest(large) == sha256(large)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("kept", ["~nobody-here/x", "/dev/null/x"])
def test_without_caches_the_digest_is_the_same(large: Path, kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "KEPT", kept)
    monkeypatch.chdir(large.parent)
    assert file_digest(large) == sha256(large)
    assert not list(large.parent.glob("~*"))


def test_a_damaged_entry_of_the_cache_is_passed_over(large: Path, tmp_path: Path) -> None:
    file_digest(large)
    (entry,) = (tmp_path / "kept").iterdir()
    entry.write_text("damaged")
    assert file_digest(large) == sha256(large)
    assert entry.read_text() == sha256(large)


def test_how_far_it_is_is_told(large: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(digests, "TOLD_SECONDS", -1.0)
    file_digest(large)
    assert f"Digest of {large}: 0.1 of 0.1 GiB" in capsys.readouterr().err
