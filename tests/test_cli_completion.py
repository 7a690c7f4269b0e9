"""Completion: what is suggested, and that bash, zsh and fish really complete with it."""

import contextlib
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bundles import TinyBundle, make_bundle
from click.testing import CliRunner
from patience import PATIENCE_S

from qaflora_edge.cli import main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the shells are POSIX ones")
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    """A folder with the bundle `bundle` of the adapters math and es, with two fits."""
    made = make_bundle(tmp_path_factory.mktemp("completion"))
    path = made.folder / "bundle.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(raw), encoding="utf-8")
    return made


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **more}


def suggested(made: TinyBundle, line: str, last: str | None = None, **more: str) -> list[str]:
    """What bash is told for a line; `last` is the part of its last word that it replaces."""
    last = line.rpartition(" ")[2] if last is None else last
    asked = {"_QAFLORA_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_LAST": last}
    with contextlib.chdir(made.folder.parent):
        done = CliRunner().invoke(main, [], env={**asked, **more}, prog_name="qaflora")
    assert (done.exit_code, done.stderr) == (0, "")
    return [line for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("line", "last", "expected"),
    [
        ("qaflora com", None, ["plain,compare", "plain,completion"]),
        ("qaflora completion ", None, ["plain,bash", "plain,zsh", "plain,fish"]),
        ("qaflora run --st", None, ["plain,--strategy", "plain,--stop"]),
        ("qaflora run ", None, ["plain,bundle"]),
        ("qaflora run b", None, ["plain,bundle"]),
        ("qaflora run nothing-here", None, ["dir"]),
        ("qaflora bundle show ./b", None, ["plain,./bundle"]),
        ("qaflora run bundle hi --lens ", None, ["plain,norm", "plain,raw"]),
        (
            "qaflora run bundle --strategy c",
            None,
            ["plain,cosine", "plain,calibrated", "plain,centroid"],
        ),
        ("qaflora run bundle --strategy single:", "", ["plain,math", "plain,es"]),
        ("qaflora run bundle hi --strategy single:m", "m", ["plain,math"]),
        ("qaflora run bundle --strategy=single:m", "m", ["plain,math"]),
        ("qaflora run bundle --strategy manual:", "", ["plain,math=", "plain,es="]),
        ("qaflora run bundle --strategy manual:math=1,", "1,", ["plain,1,es="]),
        ("qaflora run --strategy single:", "", []),
        ("qaflora pull smol", None, ["plain,smollm2-135m-instruct"]),
        ('qaflora run "b', None, ["plain,bundle"]),
    ],
)
def test_suggestions(made: TinyBundle, line: str, last: str | None, expected: list[str]) -> None:
    assert suggested(made, line, last) == expected


def test_bundles_one_folder_below_are_suggested(made: TinyBundle, tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path / "shelf/mine")
    assert suggested(made, f"qaflora run {tmp_path}/sh") == [f"plain,{tmp_path}/shelf/mine"]
    assert suggested(made, f"qaflora run {tmp_path}/shelf/") == [f"plain,{tmp_path}/shelf/mine"]


def test_home_is_looked_into_and_stays_as_typed(made: TinyBundle, tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path / "mine")
    assert suggested(made, "qaflora run ~/m", HOME=str(tmp_path)) == ["plain,~/mine"]
    assert suggested(made, "qaflora run ~no-such-user/m") == ["dir"]


def test_bundles_by_name_are_suggested(made: TinyBundle, tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path / "named")
    place = {"QAFLORA_BUNDLES": str(tmp_path)}
    assert suggested(made, "qaflora chat na", **place) == ["plain,named"]
    line = "qaflora chat named --strategy single:"
    assert suggested(made, line, "", **place) == ["plain,math", "plain,es"]


def test_names_with_spaces_are_escaped(made: TinyBundle, tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path / "my $bundle's")
    assert suggested(made, f"qaflora run {tmp_path}/my", None) == [
        rf"plain,{tmp_path}/my\ \$bundle\'s"
    ]


def test_broken_bundle_and_settings_suggest_nothing(made: TinyBundle, tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_text("{", encoding="utf-8")
    config = tmp_path / "config.toml"
    config.write_text("=", encoding="utf-8")
    line = f"qaflora run {tmp_path} --strategy single:"
    assert suggested(made, line, "", QAFLORA_CONFIG=str(config)) == []


def test_completion_is_quick(made: TinyBundle) -> None:
    """CPU time, which other work on the machine hardly changes; 150 ms is felt at the prompt.

    On a slow machine the limit is relative to the start of Python.
    """
    code = (
        "import contextlib, sys, time\n"
        "start = time.process_time()\n"
        "from qaflora_edge.cli import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main([], prog_name='qaflora')\n"
        "heavy = {'numpy', 'gguf', 'llama_cpp', 'huggingface_hub', 'rich'} & set(sys.modules)\n"
        "print('', start, time.process_time(), *heavy)\n"
    )
    line = {"COMP_WORDS": "qaflora run bundle --strategy single:", "COMP_LAST": ""}
    times = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(_QAFLORA_COMPLETE="bash_complete", **line),
            cwd=made.folder.parent,
            capture_output=True,
            text=True,
        )
        assert done.stdout.splitlines()[:2] == ["plain,math", "plain,es"], done.stderr
        start, end = map(float, done.stdout.splitlines()[2].split())
        times.append(end / max(0.15, 15 * start))
    assert min(times) < 1


SETUP = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "source <(qaflora completion bash)"),
    "zsh": (
        ["zsh", "-f", "-i"],
        "bindkey -e; autoload -Uz compinit; compinit -u -D; source <(qaflora completion zsh)",
    ),
    "fish": (["fish", "--no-config", "-i"], "qaflora completion fish | source"),
}
# Makes the terminal the shell's own, without which fish leaves and bash complains.
OWN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
)
# All words: what follows them is the next prompt.
PRINTED = b"<end>(?:<[^<>]*>)*(?=[\r\n\x1b])"
HOME_KEY, ENTER = b"\x01", b"\r"


def completed(shell: str, keys: str, made: TinyBundle, home: Path) -> list[str]:
    """Type keys at a real shell on a terminal of its own; give the words of the line then.

    The line is put behind a command that prints its words, and so read back.
    """
    command, setup = SETUP[shell]
    controller, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", OWN_TERMINAL, *command],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        cwd=made.folder.parent,
        env=environment(HOME=str(home), TERM="xterm", PS1="", XDG_DATA_HOME=str(home)),
        start_new_session=True,
    )
    os.close(terminal)
    try:
        os.write(controller, f"{setup}; echo rea''dy\r".encode())
        read_until(controller, b"[\r\n]ready\r")
        os.write(controller, keys.encode() + HOME_KEY + b"printf '<%s>' en''d " + ENTER)
        text = read_until(controller, PRINTED)
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    printed = re.findall(PRINTED, text)[-1].decode("utf-8")
    return re.findall("<([^>]*)>", printed)[1:]


def read_until(terminal: int, pattern: bytes) -> bytes:
    """What a terminal shows up to a pattern; the test fails when that does not come."""
    text, end = b"", time.monotonic() + PATIENCE_S
    while not re.search(pattern, text):
        assert time.monotonic() < end, text
        if select.select([terminal], [], [], 0.1)[0]:
            text += os.read(terminal, 4096)
    return text


@pytest.mark.slow
@pytest.mark.parametrize("shell", SETUP)
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("qaflora compl\t", ["qaflora", "completion"]),
        ("qaflora run bun\t", ["qaflora", "run", "bundle"]),
        (
            "qaflora run bundle --strategy single:m\t",
            ["qaflora", "run", "bundle", "--strategy", "single:math"],
        ),
        (
            "qaflora run bundle --strategy manual:e\t",
            ["qaflora", "run", "bundle", "--strategy", "manual:es="],
        ),
    ],
)
def test_shell_completes(
    shell: str, keys: str, words: list[str], made: TinyBundle, tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert completed(shell, keys, made, tmp_path) == words


@pytest.mark.parametrize(
    ("shell", "place", "hint"),
    [
        ("bash", "data/bash-completion/completions/qaflora", "New shells have it where"),
        ("zsh", "data/zsh/site-functions/_qaflora", "Add to ~/.zshrc, before compinit: fpath=("),
        ("fish", "config/fish/completions/qaflora.fish", "New shells have it."),
    ],
)
def test_script_is_printed_and_installed(
    shell: str, place: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    printed = CliRunner().invoke(main, ["completion", shell])
    assert (printed.exit_code, printed.stderr) == (0, "")
    assert f"_QAFLORA_COMPLETE={shell}_complete" in printed.stdout
    installed = CliRunner().invoke(main, ["completion", shell, "--install"])
    assert (installed.exit_code, installed.stdout) == (0, "")
    assert installed.stderr.startswith(f"Wrote {tmp_path / place}. {hint}")
    assert (tmp_path / place).read_text(encoding="utf-8") == printed.stdout


def test_folder_that_cannot_be_made_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    result = CliRunner().invoke(main, ["completion", "bash", "--install"])
    path = tmp_path / "file/bash-completion/completions/qaflora"
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: Cannot write {path}: making the folder {path.parent} failed: Not a directory. "
        "Print it with `qaflora completion bash` and put it elsewhere.\n"
    )
