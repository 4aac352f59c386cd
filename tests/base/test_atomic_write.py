"""A file is the old one or the new one, never a part."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mechinterp.base.atomic_write import STALE_SECONDS, temporary_name, write_whole
from mechinterp.base.errors import InputError


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def interrupt(source: str, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    monkeypatch.undo()
    write_whole(path, b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o644


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Cannot write"):
        write_whole(tmp_path / "nowhere" / "file", b"")


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_the_next_save_deletes_what_a_killed_process_left_and_nothing_else(tmp_path: Path) -> None:
    """A process is killed in the midst of writing, by a signal that runs no `finally`."""
    path = tmp_path / "file"
    code = (
        "import os, signal, sys; from mechinterp.base.atomic_write import write_whole\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_whole(sys.argv[1], b'new')"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".partial")
    mine, other_file = temporary_name(path), temporary_name(tmp_path / "file2")  # being written, it may be
    foreign = tmp_path / ".file.00000000-1-0123456789ab.partial"
    old = tmp_path / ".file.00000000-1-0123456789ac.partial"
    theirs = tmp_path / ".file.backup.partial"
    for name in (mine, other_file, foreign, old, theirs):
        name.write_bytes(b"")
    long_ago = time.time() - STALE_SECONDS - 60
    for name in (old, theirs, mine):
        os.utime(name, (long_ago, long_ago))
    write_whole(path, b"new")
    assert sorted(tmp_path.iterdir()) == sorted([path, mine, other_file, foreign, theirs])
