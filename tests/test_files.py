"""Whole files, whatever interrupts their writers, and paths that stay inside."""

import os
import time
from pathlib import Path

import pytest
from refusals import refused

from qaflora_edge import files
from qaflora_edge.errors import BundleError, OutputFileError
from qaflora_edge.files import atomic_path, check_takes_file, write_text_atomic
from qaflora_edge.formats.bundle import safe_join
from qaflora_edge.formats.inputs import open_input

POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions and links")


def test_atomic_path_replaces_the_file_at_the_end(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_atomic_path_leaves_nothing_after_a_failure(tmp_path, error) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@POSIX
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path) -> None:
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
    kept = [young, other, link, tmp_path / "a", tmp_path / "mine"]
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_atomic_path_names_a_missing_folder(tmp_path) -> None:
    path = tmp_path / "none" / "a"
    assert refused(OutputFileError, write_text_atomic, path, "x") == (
        f"Cannot write {path}: the folder {path.parent} does not take a new file: No such file "
        "or directory. Create the folder, or choose one that you can write to."
    )


@POSIX
def test_atomic_path_replaces_no_pipe_and_no_device(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    kind = "is a pipe, a socket or a device"
    kinds = {"pipe": kind, "link": kind, "folder": "is a folder"}
    for name, kind in kinds.items():
        path = tmp_path / name
        assert refused(OutputFileError, write_text_atomic, path, "x") == (
            f"Cannot write {path}: it {kind} in {tmp_path}; expected a file's name in a folder of "
            "files. Choose another name."
        )
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"]
    for place in ("/proc/self/fd/99", "/dev/new"):
        with pytest.raises(OutputFileError, match="expected a file's name in a folder of files"):
            check_takes_file(Path(place))


@pytest.mark.parametrize(
    "relative",
    [
        *("", "/etc/passwd", "\\\\server\\share\\a", "C:\\a", "C:a", "../a", "a/../../b"),
        *("a\\..\\b", "~/a", "file:a", "FILE:///a", "a\0b", "a\ud800b"),
    ],
)
def test_safe_join_refuses_paths_that_lead_out(tmp_path, relative) -> None:
    assert refused(BundleError, safe_join, tmp_path, relative) == (
        f"Refused the path {relative!r} in bundle {tmp_path}: it is absolute, climbs with '..', or "
        "is no file name; expected a relative path to a file inside the bundle. Copy the file into "
        "the bundle's folder and correct the path in bundle.json."
    )


@POSIX
def test_safe_join_follows_links_only_inside(tmp_path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "real").write_text("x")
    (tmp_path / "secret").write_text("x")
    (bundle / "inside").symlink_to("real")
    (bundle / "file_out").symlink_to("../secret")
    (bundle / "folder_out").symlink_to("..")
    (bundle / "dangling").symlink_to("../not_there_yet")
    assert safe_join(bundle, "inside").read_text() == "x"
    for name in ("file_out", "folder_out/secret", "dangling"):
        with pytest.raises(BundleError, match="a link in it leads out of the bundle"):
            safe_join(bundle, name)
    (bundle / "a..b.gguf").touch()
    assert safe_join(bundle, "a..b.gguf").is_file()
    (tmp_path / "alias").symlink_to("bundle")
    assert safe_join(tmp_path / "alias", "real").read_text() == "x"


@POSIX
def test_open_input_never_waits(tmp_path, monkeypatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", "/dev/zero"):
        with pytest.raises(OSError, match="it is a pipe, a socket or a device, not a file"):
            open_input(path)
    with pytest.raises(OSError, match="it is a folder, not a file"):
        open_input(tmp_path)
    with pytest.raises(OSError, match="the path has a null character"):
        open_input("a\0b")
