"""Interrupted, a writer leaves the old file or the whole new one; see test_killed too."""

import errno
import os
import time
from pathlib import Path

import pytest
import tiny

from qaflora_edge import files
from qaflora_edge.convert.adapter import convert_adapter
from qaflora_edge.errors import OutputFileError
from qaflora_edge.files import write_text_atomic

POSIX = pytest.mark.skipif(os.name != "posix", reason="fork, SIGKILL and file locks are POSIX")


@POSIX
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """It may belong to a writer at work as long as it is young, or of another name."""
    (tmp_path / "mine").write_text("mine")
    old, young, other, link = (
        tmp_path / f".tmp-{name}"
        for name in ("1" * 8 + "-a", "2" * 8 + "-a", "3" * 8 + "-b", "4" * 8 + "-a")
    )
    for path in (old, young, other):
        path.write_text("half")
    link.symlink_to(tmp_path / "mine")
    for path in (old, other):
        os.utime(path, (0, time.time() - 2 * files.LEFT_OVER_SECONDS))
    os.utime(link, (0, 0), follow_symlinks=False)
    write_text_atomic(tmp_path / "a", "whole")
    assert sorted(tmp_path.iterdir()) == sorted(
        [young, other, link, *(tmp_path / n for n in ("a", "mine"))]
    )


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_failure_at_the_end_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    base = tiny.write_tiny_base(tmp_path / "base.gguf", n_layer=1)
    peft = tiny.write_tiny_peft(tmp_path / "peft", base, targets=("q_proj",))
    out = tmp_path / "out" / "math.gguf"
    out.parent.mkdir()
    out.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, function, fail)
    with pytest.raises(OutputFileError) as caught:
        convert_adapter(peft, base.path, out)
    assert str(caught.value) == (
        f"Cannot write {out}: the disk is full. Free some space and try again."
        if code == errno.ENOSPC
        else f"Cannot write {out}: {os.strerror(code)}. Check the disk and that you may write to "
        f"{out.parent}; what was there is unchanged."
    )
    assert out.read_text() == "old"
    assert os.listdir(out.parent) == ["math.gguf"]
