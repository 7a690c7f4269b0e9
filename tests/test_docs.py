"""README and docs/ as they stand: every command and script of them is run."""

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
from qaflora_edge.bundles.edit import calibrate
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
PROMPTS = "How many legs do three dogs have?\n¿Qué es un río?\nName a fruit.\n"


def page_id(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


# Above all other logits of the base of the pages, which are below 5: it writes " everywhere, and
# ends strings and objects as soon as a grammar lets it.
LIKELY = {'"': 20.0, "}": 15.0, ",": 14.0}


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """What the commands of the pages find: a bundle, a base, adapters and prompts, all tiny."""
    folder = tmp_path_factory.mktemp("pages")
    bias = tiny.constant_logits(lambda token: LIKELY.get(token, 0.0))["output.bias"]
    options = {"n_ctx": 1024, "replace": {"output.bias": bias}}
    base = tiny.write_tiny_base(folder / "base.gguf", "qwen2", **options)
    for seed, name in enumerate(("math", "es", "med")):
        tiny.write_tiny_peft(folder / "peft" / name, base, seed=seed)
    convert_adapter(folder / "peft/math", base.path, folder / "adapter.gguf")
    adapters = {name: folder / "peft" / name for name in ("math", "es", "med")}
    (folder / "models").mkdir()
    create_bundle(folder / "models/demo", base.path, adapters, engine=Engine, name="demo")
    calibrate(folder / "models/demo", Engine)
    shutil.copytree(folder / "models/demo", folder / "demo")
    (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    return folder


@pytest.fixture
def scratch(tmp_path, material) -> Path:
    """A folder of its own for the blocks of one page."""
    return shutil.copytree(material, tmp_path / "page", symlinks=True)


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
    }
    script = home / f"block-{block.line}"
    script.write_text(block.text, encoding="utf-8")
    program = {"sh": ["bash", "-e", "-o", "pipefail"], "python": [sys.executable]}
    return subprocess.run(
        [*program[block.language], str(script)],
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
def test_blocks_of_the_page_run(page, scratch, tmp_path) -> None:
    """With a tiny bundle; test_transcript types the same commands on the real one."""
    for block in runnable(page):
        done = run_block(block, scratch, tmp_path / "home")
        assert done.returncode == 0, f"{page.name}:{block.line}: {done.stdout}\n{done.stderr}"


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


@pytest.mark.slow
def test_the_mix_makes_the_demos_right_answers_likelier(checkout, smollm2) -> None:
    """Which of two near words is written hangs on the kernels; how likely they are does not."""
    with Engine(checkout / "models/demo", n_ctx=512) as engine:
        for each in DEMO["SMALL"].questions:
            tokens = engine.chat_tokens([{"role": "user", "content": each.text}])
            base, mix = (engine.score(tokens, each.right, weights=w) for w in ("base", "qa-flora"))
            assert mix.sum() > base.sum() + 0.3, each.text


def test_adapters_of_the_demo_are_those_of_its_page(checkout) -> None:
    """Small files, as bundle.json and the table of the README name them."""
    folder = checkout / "demo"
    page = (folder / "README.md").read_text(encoding="utf-8")
    adapters = read_bundle_text(folder).adapters
    asked = {name for each in DEMO["QWEN"].questions for name in each.mix}
    assert asked < {each.name for each in adapters}
    for each in adapters:
        assert (folder / each.file).stat().st_size == each.size_bytes < 5_000_000
        assert checksum(folder / each.file) == each.sha256
        assert f"`{each.sha256}`" in page


@pytest.mark.slow
@pytest.mark.parametrize("kernels", KERNELS)
def test_the_demo_answers_rightly_with_the_mix_that_it_names(
    kernels, checkout, monkeypatch
) -> None:
    demo = DEMO["QWEN"]
    if pulled_model(demo.base) is None:
        pytest.skip(f"{demo.base} was not pulled")
    monkeypatch.setenv("QAFLORA_CPU_KERNELS", kernels)
    with Engine(checkout / demo.bundle, n_ctx=512) as engine:
        for each in demo.questions:
            tokens = engine.chat_tokens([{"role": "user", "content": each.text}])
            strategy = each.ways.partition(",")[0] or None
            answer = engine.generate(tokens, max_tokens=160, strategy=strategy)
            assert each.right in answer.text()
            if (step := answer.fusion.plan.drafting) is not None:
                assert (step.knower, answer.fusion.writer) == each.mix
                continue
            means = zip(engine.adapters, answer.fusion.weights.mean(axis=1), strict=True)
            assert {name for name, mean in means if mean} == {*each.mix}


@pytest.mark.parametrize("page", ["docs/quickstart.md"])
def test_questions_of_the_first_pages_are_the_demos(page, checkout) -> None:
    """Those that the mix answers rightly: what people see first should be right."""
    text = (checkout / page).read_text(encoding="utf-8")
    asked = re.findall(r'qaflora (?:run|compare|weights) \S+ "([^"]+)"', text)
    asked += re.findall(r'^    (?:text|question) = "([^"]+)"', text, re.MULTILINE)
    assert len(asked) > 3
    assert set(asked) <= {each.text for each in DEMO["QWEN"].questions}


def test_changelog_begins_with_this_version(checkout) -> None:
    text = (checkout / "CHANGELOG.md").read_text(encoding="utf-8")
    heads = [part.split()[0] for part in text.split("\n## ")[1:]]
    assert next(head for head in heads if head != "Unreleased") == qaflora_edge.__version__


def test_index_names_every_page(checkout) -> None:
    index = (checkout / "docs/README.md").read_text(encoding="utf-8")
    pages = [page.name for page in (checkout / "docs").glob("*.md") if page.name != "README.md"]
    assert [name for name in pages if f"({name})" not in index] == []
