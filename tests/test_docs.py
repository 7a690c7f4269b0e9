"""README, docs/ and --help as they stand: every command and script of them is run.

Pages that show what a command prints are run where the base was pulled, and what is printed is
compared. `demo` is there the bundle of the smaller base: the facts in its answers are those of the
page, its mixes and scores are not. `make test-demo` takes `demo` itself, and compares all. Others,
and the examples of --help, are run with tiny bundles of which the same is measured: a command has
to work on a fresh clone.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import tiny
from bundles import bundle_json
from pages import RUN, Block, differences, escaped_commands, page_paths, read_blocks
from patience import PATIENCE_S

import qaflora_edge
from qaflora_edge import Engine
from qaflora_edge.bundles.create import create_bundle
from qaflora_edge.cli import VERBS, main
from qaflora_edge.convert.adapter import convert_adapter
from qaflora_edge.files import cache_dir
from qaflora_edge.formats.bundle import read_bundle_text
from qaflora_edge.formats.inputs import checksum
from qaflora_edge.formats.names import pulled_model

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = page_paths(CHECKOUT)
KERNELS = ("", *{"avx2"}.intersection(tiny.MORE_KERNELS), tiny.PLAIN_KERNELS)
DEMO = runpy.run_path(str(CHECKOUT / "models/demo.py"))
IS_DEMO = "QAFLORA_TEST_DEMO" in os.environ
SHOWN = DEMO["QWEN" if IS_DEMO else "SMALL"]
PROMPTS = "How many legs do three dogs have?\n¿Qué es un río?\nName a fruit.\n"
SUMS = "How many legs do three dogs have?\nIda eats 2 of 9 eggs. How many are left?\n3 times 4?\n"


def page_id(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


# Above all other logits of the base of the pages, which are below 5: it writes " everywhere, and
# ends strings and objects as soon as a grammar lets it.
LIKELY = {'"': 20.0, "}": 15.0, ",": 14.0}


NAMES = ("math", "es", "med", "company", "json")  # of adapters that pages and help name
QUESTION = '{"question": "What is 3 times 4?", "answer": 12}\n'
FILES = {  # that examples of --help name
    "sums.jsonl": QUESTION,
    "chat.jsonl": QUESTION,
    "questions.jsonl": '{"prompt": "Name a fruit."}\n',
    "questions.txt": SUMS,
    "everyday.txt": PROMPTS,
    "tickets.txt": PROMPTS,
    "prompts.txt": PROMPTS,
    "talk.json": '{"format": "qaflora-session/1", "messages": []}\n',
    "Modelfile": "FROM ./base.gguf\nADAPTER ./adapter.gguf\n",
}
# Begins of examples that are not run, and why.
NOT_RUN = {
    "qaflora serve": "it serves until it is ended",
    "QAFLORA_API_KEY=": "it serves until it is ended",
    "qaflora worker": "it serves until it is ended",
    "qaflora run demo --rpc": "it needs workers",
    "qaflora pull": "it needs the Hub",
    "qaflora remove": "it would remove what other tests read",
    "qaflora bench": "it takes minutes",
    "qaflora bundle add my-bundle law=owner": "it needs the Hub",
    "qaflora bundle base": "it needs the Hub, or a base in the home folder",
}
N_TOKEN = "24"  # of an answer, where neither a command nor what is printed below it says more


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """What the commands find: bundles, and a base, adapters and prompts that are tiny."""
    folder = tmp_path_factory.mktemp("pages")
    bias = tiny.constant_logits(lambda token: LIKELY.get(token, 0.0))["output.bias"]
    options = {"n_ctx": 1024, "replace": {"output.bias": bias}}
    base = tiny.write_tiny_base(folder / "base.gguf", "qwen2", **options)
    for seed, name in enumerate(NAMES):
        tiny.write_tiny_peft(folder / "peft" / name, base, seed=seed)
    convert_adapter(folder / "peft/math", base.path, folder / "adapter.gguf")
    shutil.copy(folder / "adapter.gguf", folder / "es.gguf")
    shutil.copytree(folder / "peft/math", folder / "my-peft-adapter")
    (folder / "models").mkdir()
    adapters = {name: folder / "peft" / name for name in NAMES}
    tiny_demo = folder / "models/demo"
    create_bundle(tiny_demo, base.path, adapters, engine=Engine, name="demo")
    shutil.copytree(tiny_demo, folder / "demo")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def scratch(tmp_path, material) -> Path:
    """A folder of its own for the blocks of one page."""
    return shutil.copytree(material, tmp_path / "page", copy_function=os.link)


def test_the_tiny_demo_is_measured_as_that_of_a_clone_is(material) -> None:
    ours, theirs = (bundle_json(place / "demo")["fusion"] for place in (material, CHECKOUT))
    assert ours["typical"]["math"].keys() == theirs["typical"]["math"].keys()
    assert ours["strategy"] == theirs["strategy"]


def put_real_demos(folder: Path) -> None:
    """Put the checkout's bundles in place of the tiny ones."""
    for name, bundle in (("demo", SHOWN.bundle), ("models/demo", "models/demo")):
        shutil.rmtree(folder / name)
        shutil.copytree(CHECKOUT / bundle, folder / name)


def put_real_adapters(folder: Path, base: Path) -> None:
    """Put the demo's base, and two of its adapters as PEFT folders, in place of the tiny ones."""
    (folder / "base.gguf").unlink()
    (folder / "base.gguf").symlink_to(base)
    write_peft = runpy.run_path(str(CHECKOUT / "benchmarks/as_peft.py"))["write_peft"]
    for name in ("math", "es"):
        shutil.rmtree(folder / "peft" / name)
        write_peft(CHECKOUT / SHOWN.bundle / f"adapters/{name}.gguf", folder / "peft" / name)


def run_block(
    block: Block, folder: Path, home: Path, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run a block as a user would, with a home of its own and no network.

    What it prints stands in stdout, in the order in which a terminal shows it.
    """
    home.mkdir(exist_ok=True)
    names = ("QAFLORA_", "HF_", "LLM_", "XDG_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "QAFLORA_CACHE": str(cache_dir()),
        "HF_HUB_OFFLINE": "1",
        "TERM": "dumb",
        **settings,
    }
    script = home / f"block-{block.line}"
    script.write_text(block.text, encoding="utf-8")
    program = {"sh": ["bash", "-e", "-o", "pipefail"], "python": [sys.executable]}
    return subprocess.run(
        [*program[block.language], str(script)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
    )


def runnable(page: Path) -> list[Block]:
    blocks = read_blocks(page.read_text(encoding="utf-8"))
    return [block for block in blocks if block.language in RUN and block.not_run is None]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=page_id)
def test_blocks_of_the_page_run_and_print_what_stands_below(page, scratch, tmp_path) -> None:
    base = pulled_model(SHOWN.base)
    is_compared = base is not None and any(block.output for block in runnable(page))
    if is_compared:
        put_real_demos(scratch)
    if is_compared and page.name == "README.md":
        put_real_adapters(scratch, base)
    settings = {} if is_compared else {"QAFLORA_MAX_TOKENS": N_TOKEN}
    for block in runnable(page):
        done = run_block(block, scratch, tmp_path / "home", **settings)
        where = f"{page.name}:{block.line}"
        assert done.returncode == 0, f"{where}: {done.stdout}"
        if block.output and is_compared:
            found = differences(block.output, done.stdout)
            wrong = [line for line in found if IS_DEMO or line.startswith("fact ")]
            assert wrong == [], f"{where} prints\n{done.stdout}"


def examples(command: click.Command, words: str) -> Iterator[tuple[str, str]]:
    """Walk through the commands: `qaflora ...` and each example of its help."""
    text = (command.epilog or "").replace("\\\n", " ")
    for line in text.splitlines():
        if re.match(r"  (\w.* )?qaflora ", line):
            yield words, " ".join(line.split())
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from examples(inner, f"{words} {name}")


EXAMPLES = [
    pytest.param(words, example, id=example[:60])
    for words, example in examples(main, "qaflora")
    if not example.startswith(tuple(NOT_RUN))
]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "example"), EXAMPLES)
def test_examples_of_help_run(words, example, scratch, tmp_path) -> None:
    before = "mkdir -p ~/.config/fish/completions ~/.local/share/bash-completion/completions\n"
    before += "git init --quiet .\n"
    if "my-bundle" in example and words != "qaflora bundle create":
        before += "qaflora bundle create my-bundle --base base.gguf --adapter math=peft/math"
        before += " --adapter es=es.gguf --no-calibrate\n"
    if words == "qaflora bundle remove":
        before += "qaflora bundle add my-bundle med=peft/med --no-calibrate\n"
    block = Block(0, "sh", before + example, None)
    done = run_block(block, scratch, tmp_path / "home", QAFLORA_MAX_TOKENS=N_TOKEN)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("begin", NOT_RUN)
def test_every_reason_not_to_run_an_example_is_needed(begin) -> None:
    assert any(example.startswith(begin) for _, example in examples(main, "qaflora"))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_command_of_the_page_escapes(page) -> None:
    assert escaped_commands(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_of_the_page_lead_somewhere(page) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    targets += re.findall(r'src(?:set)?="([^":]+)"', text)
    assert [target for target in targets if not (page.parent / target).exists()] == []


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
def test_commands_named_in_the_text_exist(page) -> None:
    text = page.read_text(encoding="utf-8")
    for line in re.findall(r"`(?:[A-Z_]+=\S+ )?qaflora ([^`]+)`", text):
        words = line.split()
        found = command_options(words)
        assert found is not None, f"{page.name} names `qaflora {line}`, which is no command"
        name, options = found
        named = {word.partition("=")[0] for word in words if re.fullmatch("--[a-z].*", word)}
        assert named <= options, f"{page.name} gives {name} options that it does not have"


def test_readme_names_every_verb(checkout) -> None:
    text = (checkout / "README.md").read_text(encoding="utf-8")
    assert [verb for verb in VERBS if f"qaflora {verb}" not in text] == []


@pytest.mark.parametrize("bundle", ["demo", "models/demo-small"])
def test_adapters_of_the_demo_are_those_of_its_page(checkout, bundle) -> None:
    """Small files, as bundle.json and the table of the README name them."""
    folder = checkout / bundle
    page = (folder / "README.md").read_text(encoding="utf-8")
    adapters = read_bundle_text(folder).adapters
    asked = {name for each in DEMO["QUESTIONS"] for name in each.mix}
    assert asked < {each.name for each in adapters}
    for each in adapters:
        assert (folder / each.file).stat().st_size == each.size_bytes < 6_000_000
        assert checksum(folder / each.file) == each.sha256
        assert f"`{each.sha256}`" in page


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_demo_answers_rightly_with_the_mix_that_it_names(
    kernels, checkout, monkeypatch
) -> None:
    if pulled_model(SHOWN.base) is None:
        pytest.skip(f"{SHOWN.base} was not pulled")
    monkeypatch.setenv("QAFLORA_CPU_KERNELS", kernels)
    with Engine(checkout / SHOWN.bundle, n_ctx=512) as engine:
        for each in DEMO["QUESTIONS"]:
            tokens = engine.chat_tokens([{"role": "user", "content": each.text}])
            answer = engine.generate(tokens, max_tokens=160)
            text = answer.text()
            if kernels != tiny.PLAIN_KERNELS:  # whose rounding depends on who shares a batch
                assert each.right in text
            if (step := answer.fusion.plan.drafting) is not None:
                assert (step.knower, answer.fusion.writer) == each.mix
                continue
            means = zip(engine.adapters, answer.fusion.weights.mean(axis=1), strict=True)
            taken = {name for name, mean in means if mean}
            assert {*each.mix[:1]} <= taken <= {*each.mix}


@pytest.mark.parametrize("page", ["docs/quickstart.md"])
def test_questions_of_the_first_pages_are_the_demos(page, checkout) -> None:
    """Those that the mix answers rightly: what people see first should be right."""
    text = (checkout / page).read_text(encoding="utf-8")
    asked = re.findall(r'qaflora (?:run|compare|weights) \S+ "([^"]+)"', text)
    asked += re.findall(r'^    (?:text|question) = "([^"]+)"', text, re.MULTILINE)
    assert len(asked) > 3
    assert set(asked) <= {each.text for each in DEMO["QUESTIONS"]}


def test_changelog_begins_with_this_version(checkout) -> None:
    text = (checkout / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = [part.split()[0] for part in text.split("\n## ")[1:]]
    assert next(head for head in heads if head != "Unreleased") == qaflora_edge.__version__


def test_index_names_every_page(checkout) -> None:
    index = (checkout / "docs/README.md").read_text(encoding="utf-8")
    pages = [page.name for page in (checkout / "docs").glob("*.md") if page.name != "README.md"]
    assert [name for name in pages if f"({name})" not in index] == []
