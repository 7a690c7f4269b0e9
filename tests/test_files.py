"""Whole files, hashes, and paths that stay inside."""

import errno
import os
import socket
import stat
import sys
from pathlib import Path

import pytest

from qaflora_edge.errors import BundleError, InputFileError, OutputFileError
from qaflora_edge.files import (
    atomic_path,
    cache_dir,
    check_has_folder,
    open_input,
    package_data,
    safe_join,
    sha256_file,
    write_text_atomic,
)

POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions and links")


def test_atomic_path_replaces_the_file_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_atomic_path_leaves_nothing_after_a_failure(tmp_path: Path, error: BaseException) -> None:
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
def test_atomic_path_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text_atomic(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_atomic_path_takes_a_long_name(tmp_path: Path) -> None:
    for name in ("n" * 200 + ".gguf", "数" * 80 + ".json", "a." + "数" * 80):
        write_text_atomic(tmp_path / name, "x")
        assert (tmp_path / name).read_text() == "x"


def test_atomic_path_names_a_missing_folder(tmp_path: Path) -> None:
    path = tmp_path / "none" / "a"
    with pytest.raises(OutputFileError) as caught:
        write_text_atomic(path, "x")
    assert str(caught.value) == (
        f"Cannot write {path}: the folder {path.parent} does not take a new file: No such file "
        "or directory. Create the folder, or choose one that you can write to."
    )


@POSIX
def test_atomic_path_replaces_no_pipe_and_no_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    (tmp_path / "folder").mkdir()
    kinds = {"pipe": "a named pipe", "link": "a device", "folder": "a folder"}
    for name, kind in kinds.items():
        path = tmp_path / name
        with pytest.raises(OutputFileError) as caught:
            write_text_atomic(path, "x")
        assert str(caught.value) == (
            f"Cannot write {path}: it is {kind} and a file was expected. Choose another name."
        )
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert (tmp_path / "link").is_symlink()


def test_a_folder_that_takes_no_file_is_seen_before_the_work(tmp_path: Path) -> None:
    check_has_folder(tmp_path / "new")
    assert not [*tmp_path.iterdir()]
    for place in ("/proc/self/fd/99", "/dev/null"):
        with pytest.raises(OutputFileError, match="files are not made in"):
            check_has_folder(Path(place))
    check_has_folder(Path("/dev/null"), is_added_to=True)


def test_atomic_path_reports_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def write() -> None:
        with atomic_path(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputFileError) as caught:
        write()
    assert str(caught.value) == (
        f"Cannot write {path}: the disk is full. Free some space and try again."
    )
    assert os.listdir(tmp_path) == []


def test_sha256_file_matches_the_standard_and_reports(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    seen: list[int] = []
    # FIPS 180-2, appendix B.1
    assert sha256_file(path, seen.append) == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    assert seen == [3]


def test_sha256_file_names_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none"
    with pytest.raises(InputFileError) as caught:
        sha256_file(path)
    assert str(caught.value) == (
        f"Cannot hash {path}: reading it failed: No such file or directory. Check that the file "
        "exists and that you may read it."
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the XDG rules are for Linux")
@pytest.mark.parametrize(
    ("xdg", "expected"),
    [("/some/cache", "/some/cache"), ("relative", "{home}/.cache"), ("", "{home}/.cache")],
)
def test_cache_dir_follows_xdg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xdg: str, expected: str
) -> None:
    monkeypatch.delenv("QAFLORA_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert cache_dir() == Path(expected.format(home=tmp_path)) / "qaflora-edge"
    monkeypatch.setenv("QAFLORA_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"


def test_safe_join_accepts_files_inside(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    assert safe_join(tmp_path, "adapters/a.gguf") == tmp_path / "adapters" / "a.gguf"
    (tmp_path / "adapters" / "a..b.gguf").touch()
    assert safe_join(tmp_path, "adapters/a..b.gguf").is_file()


@pytest.mark.parametrize(
    ("relative", "reason"),
    [
        ("", "it is empty"),
        ("/etc/passwd", "it is absolute"),
        ("\\\\server\\share\\a", "it is absolute"),
        ("C:\\a", "it is absolute"),
        ("C:a", "it is absolute"),
        ("../a", "it contains '..'"),
        ("a/../../b", "it contains '..'"),
        ("a\\..\\b", "it contains '..'"),
        ("~/a", "it begins with '~', which stands for a home folder"),
        ("file:a", "it is an address"),
        ("FILE:///a", "it is an address"),
        ("a\0b", "it contains a null character"),
        ("a\ud800b", "it contains half a character (a lone surrogate), which no file name has"),
    ],
)
def test_safe_join_refuses_paths_that_lead_out(tmp_path: Path, relative: str, reason: str) -> None:
    with pytest.raises(BundleError) as caught:
        safe_join(tmp_path, relative)
    assert str(caught.value) == (
        f"Refused the path {relative!r} in bundle {tmp_path}: {reason}; expected a relative path "
        "to a file inside the bundle. Copy the file into the bundle's folder and correct the "
        "path in bundle.json."
    )


@POSIX
def test_safe_join_follows_links_only_inside(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "real").write_text("x")
    (tmp_path / "secret").write_text("x")
    (bundle / "inside").symlink_to("real")
    (bundle / "file_out").symlink_to("../secret")
    (bundle / "folder_out").symlink_to("..")
    (bundle / "dangling").symlink_to("../not_there_yet")
    (bundle / "loop").symlink_to("loop")
    assert safe_join(bundle, "inside").read_text() == "x"
    for name in ("file_out", "folder_out/secret", "dangling"):
        with pytest.raises(BundleError, match="a link in it leads out of the bundle"):
            safe_join(bundle, name)
    with pytest.raises(BundleError, match="it cannot be examined"):
        safe_join(bundle, "loop")
    (tmp_path / "alias").symlink_to("bundle")
    assert safe_join(tmp_path / "alias", "real").read_text() == "x"


@POSIX
def test_safe_join_refuses_what_is_not_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name in ("pipe", "socket"):
            with pytest.raises(BundleError, match="it is neither a file nor a folder"):
                safe_join(tmp_path, name)


def test_package_data_finds_what_ships() -> None:
    assert package_data("models/registry.json").is_file()
    with pytest.raises(InputFileError, match=r"Cannot find no/such, which ships with"):
        package_data("no/such")


@POSIX
def test_open_input_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match="it is a named pipe, not a file"):
            open_input(tmp_path / name)
    with pytest.raises(OSError, match="it is a device, not a file"):
        open_input("/dev/zero")
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        open_input(tmp_path)
    with pytest.raises(OSError, match="the path has a null character"):
        open_input("a\0b")
