"""README and docs/ as they stand: every command and script of them is run, and says something."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import tiny
from pages import RUN, Block, escaped_commands, page_paths, read_blocks
from patience import PATIENCE_S

import qaflora_edge
from qaflora_edge import Engine
from qaflora_edge.bundles.create import create_bundle
from qaflora_edge.cli import VERBS, main
from qaflora_edge.convert.adapter import convert_adapter
from qaflora_edge.files import cache_dir

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = page_paths(CHECKOUT)
DEMO = runpy.run_path(str(CHECKOUT / "models/demo.py"))
PROMPTS = "How many legs do three dogs have?\n¿Qué es un río?\nName a fruit.\n"


def page_id(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


def describe(done: subprocess.CompletedProcess[str]) -> str:
    return f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


# Above all other logits of the base of the pages, which are below 5: it writes " everywhere, and
# ends strings and objects as soon as a grammar lets it.
LIKELY = {'"': 20.0, "}": 15.0, ",": 14.0}


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands of the pages find: a bundle, a base, adapters and prompts, all tiny."""
    folder = tmp_path_factory.mktemp("pages")
    bias = tiny.constant_logits(lambda token: LIKELY.get(token, 0.0))["output.bias"]
    base = tiny.write_tiny_base(
        folder / "base.gguf", "qwen2", n_ctx=1024, replace={"output.bias": bias}
    )
    for seed, name in enumerate(("math", "es", "med")):
        tiny.write_tiny_peft(folder / "peft" / name, base, seed=seed)
    convert_adapter(folder / "peft/math", base.path, folder / "adapter.gguf")
    adapters = {name: folder / "peft" / name for name in ("math", "es", "med")}
    (folder / "models").mkdir()
    create_bundle(folder / "models/demo", base.path, adapters, engine=Engine, name="demo")
    (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    return folder


def link_or_copy(source: str, target: str) -> None:
    """Commands replace files and never write into them, so a second name is enough."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@pytest.fixture
def scratch(tmp_path: Path, material: Path) -> Path:
    """A folder of its own for the blocks of one page."""
    folder = tmp_path / "page"
    shutil.copytree(material, folder, symlinks=True, copy_function=link_or_copy)
    return folder


# Fails when a print in a page shows nothing, however often it is called.
PYTHON = """
import ast, builtins, collections, runpy, sys

said = collections.defaultdict(str)
show = builtins.print

def note(*values, sep=" ", **options):
    said[sys._getframe(1).f_lineno] += sep.join(map(str, values))
    show(*values, sep=sep, **options)

builtins.print = note
runpy.run_path(sys.argv[1], run_name="__main__")
with open(sys.argv[1], encoding="utf-8") as file:
    calls = [node for node in ast.walk(ast.parse(file.read())) if isinstance(node, ast.Call)]
prints = [call for call in calls if getattr(call.func, "id", "") == "print" and call.args]
if silent := [call.lineno for call in prints if not said[call.lineno].strip()]:
    sys.exit(f"the print of line {silent} shows nothing")
"""
# Fails when an answer of `qaflora run` is empty.
BASH = """
qaflora() {
    case "$1 $* " in run*" -o "*) ;; run*) local is_answer=1 ;; esac
    if [ -z "${is_answer-}" ]; then command qaflora "$@"; return; fi
    command qaflora "$@" | tee -p "$HOME/answer" || return
    grep -q '[^[:space:]]' "$HOME/answer" || { echo "qaflora $* answers nothing" >&2; return 1; }
}
. "$0"
"""


def run_block(block: Block, folder: Path, home: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as a user would, with a home of its own and no network."""
    home.mkdir(exist_ok=True)
    names = ("QAFLORA_", "HF_", "LLM_", "XDG_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "QAFLORA_CACHE": str(cache_dir()),
        "HF_HUB_OFFLINE": "1",
        "TERM": "dumb",
        "GOMP_SPINCOUNT": "0",
    }
    script = home / f"block-{block.line}"
    script.write_text(block.text, encoding="utf-8")
    program = {
        "sh": ["bash", "-e", "-o", "pipefail", "-c", BASH],
        "python": [sys.executable, "-c", PYTHON],
    }[block.language]
    return subprocess.run(
        [*program, str(script)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def runnable(page: Path) -> list[Block]:
    blocks = read_blocks(page.read_text(encoding="utf-8"))
    return [block for block in blocks if block.language in RUN and block.not_run is None]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=page_id)
def test_blocks_of_the_page_run(page: Path, scratch: Path, tmp_path: Path) -> None:
    """With a tiny bundle; test_transcript types the same commands on the real one."""
    for block in runnable(page):
        done = run_block(block, scratch, tmp_path / "home")
        assert done.returncode == 0, f"{page.name}:{block.line}: {describe(done)}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "text", "said"),
    [
        ("python", "print('a')\nprint()\nfor x in 'ab': print(x.strip())\n", ""),
        ("python", "print('a')\nprint(' ')\n", "the print of line [2] shows nothing"),
        ("python", "for x in '': print(x)\n", "the print of line [1] shows nothing"),
        ("sh", "qaflora doctor > doctor.txt\n", ""),
        ("sh", "qaflora run models/demo '?' --max-tokens 0\n", "--max-tokens 0 answers nothing"),
    ],
)
def test_block_that_shows_nothing_fails(
    language: str, text: str, said: str, scratch: Path, tmp_path: Path
) -> None:
    done = run_block(Block(1, language, text, None), scratch, tmp_path / "home")
    assert (done.returncode == 0) is (not said), describe(done)
    assert said in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_command_of_the_page_escapes(page: Path) -> None:
    assert escaped_commands(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_of_the_page_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text) + re.findall(
        r'src(?:set)?="([^":]+)"', text
    )
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def command_options(words: list[str]) -> tuple[str, set[str]] | None:
    """The command that words begin with and all of its options, or None when there is none."""
    command: click.Command | None = main
    context = click.Context(main)
    name = "qaflora"
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, command = f"{name} {words[0]}", command.get_command(context, words.pop(0))
    if command is None:
        return None
    options = {"--help", "-h"}
    for parameter in command.get_params(context):
        options |= {*parameter.opts, *parameter.secondary_opts}
    return name, options


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_named_in_the_text_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for line in re.findall(r"`(?:[A-Z_]+=\S+ )?qaflora ([^`]+)`", text):
        words = line.split()
        found = command_options(words)
        assert found is not None, f"{page.name} names `qaflora {line}`, which is no command"
        name, options = found
        named = {word.partition("=")[0] for word in words if re.fullmatch("--[a-z].*", word)}
        assert named <= options, f"{page.name} gives {name} options that it does not have"


def test_readme_names_every_verb(checkout: Path) -> None:
    text = (checkout / "README.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"qaflora {verb}" not in text] == []


@pytest.mark.slow
def test_the_demo_shows_each_row_of_a_question(
    smollm2: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other questions take the same way, and test_transcript asks two of them."""
    told = DEMO["show"].__globals__
    monkeypatch.setitem(told, "MAX_TOKENS", 2)  # rows, not words, are looked at
    monkeypatch.setitem(told, "QUESTIONS", DEMO["QUESTIONS"][-1:])
    DEMO["main"]()
    caveat, *shown = capsys.readouterr().out.split("\n--- ")
    assert "all of them are wrong" in caveat
    assert [text.count("weighs most at layers") for text in shown] == [1]
    rows = [row.split()[0] for row in re.split(r"─{40,}", shown[0])[2:-1]]
    assert rows == ["base", "single:math", "single:es", "single:med", "qa-flora"]


@pytest.mark.slow
def test_the_mix_makes_the_demos_right_answers_likelier(checkout: Path, smollm2: Path) -> None:
    """Which of two near words is written hangs on the kernels; how likely they are does not."""
    with Engine(checkout / "models/demo", n_ctx=512) as engine:
        for _, question, right in DEMO["QUESTIONS"]:
            tokens = engine.chat_tokens([{"role": "user", "content": question}])
            base, mix = (engine.score(tokens, right, weights=w) for w in ("base", "qa-flora"))
            assert mix.sum() > base.sum() + 0.3, question


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_questions_of_the_first_pages_are_the_demos(page: str, checkout: Path) -> None:
    """Those that the mix answers rightly: what people see first should be right."""
    text = (checkout / page).read_text(encoding="utf-8")
    asked = re.findall(r'qaflora (?:run|compare|weights) \S+ "([^"]+)"', text)
    asked += re.findall(r'^    (?:text|question) = "([^"]+)"', text, re.MULTILINE)
    assert len(asked) > 3
    assert set(asked) <= {question for _, question, _ in DEMO["QUESTIONS"]}


def test_changelog_begins_with_this_version(checkout: Path) -> None:
    text = (checkout / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = [part.split()[0] for part in text.split("\n## ")[1:]]
    assert next(head for head in heads if head != "Unreleased") == qaflora_edge.__version__


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```bash\nqaflora doctor\n```\n", ["1: a block of bash; use sh, or text for a sample"]),
        ("```\nhello\n```\n", ["1: a block of no language; use sh, or text for a sample"]),
        ("Try:\n\n    qaflora doctor\n", ["3: a command in an indented block: qaflora doctor"]),
        (
            "```text\n$ qaflora doctor\nlibrary\n```\n",
            ["1: a command in a block of text: $ qaflora doctor"],
        ),
        ("```text\nfetch it with `qaflora pull x`\n```\n", []),
        ("```sh\nqaflora doctor\n```\n", []),
        ("<!-- not run: it needs a GPU -->\n```sh\nqaflora doctor\n```\n", []),
    ],
)
def test_escape_is_found(text: str, found: list[str]) -> None:
    assert escaped_commands(text)[: len(found) or 1] == found


def test_reason_and_place_of_a_block_are_read() -> None:
    text = "Words.\n\n<!-- not run: a GPU -->\n```sh\na\n```\n\n```sh\nb\n```\n"
    assert read_blocks(text) == [Block(4, "sh", "a\n", "a GPU"), Block(8, "sh", "b\n", None)]


def test_block_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="line 3 has no end"):
        read_blocks("Words.\n\n```sh\nqaflora doctor\n")


def test_index_names_every_page(checkout: Path) -> None:
    index = (checkout / "docs/README.md").read_text(encoding="utf-8")
    pages = [page.name for page in (checkout / "docs").glob("*.md") if page.name != "README.md"]
    assert [name for name in pages if f"({name})" not in index] == []
