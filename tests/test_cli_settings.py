"""Settings of the commands: who wins, what is refused, and the table of the documents."""

import json
import re
from pathlib import Path

import pytest
from bundles import qaflora, said_by, shared_settings

from qaflora_edge import Engine
from qaflora_edge.cli.options import meaning
from qaflora_edge.cli.settings import OPTIONS, TABLES, variables

# Variables that no option has.
OTHERS = {
    f"QAFLORA_{name}"
    for name in (
        "CACHE",
        "BUNDLES",
        "CONFIG",
        "LIB_PATH",
        "CPU_KERNELS",
        "RPC_TIMEOUT",
        "SOURCE_ARCHIVE",
    )
}


def weighed(folder: Path, *args: str) -> str:
    """The strategy that `qaflora weights` uses."""
    result = qaflora("weights", folder, "the thing", "--json", *args)
    assert result.exit_code == 0, result.stderr
    strategy: str = json.loads(result.stdout)["strategy"]
    return strategy


def test_command_line_wins_over_environment_over_file_over_bundle(
    made, config, monkeypatch
) -> None:
    assert weighed(made.folder) == "qa-flora"
    config.write_text('strategy = "spectr"\n', encoding="utf-8")
    assert weighed(made.folder) == "spectr"
    config.write_text('strategy = "spectr"\n[weights]\nstrategy = "static"\n', encoding="utf-8")
    assert weighed(made.folder) == "static"
    monkeypatch.setenv("QAFLORA_STRATEGY", "spectr")
    assert weighed(made.folder) == "spectr"
    monkeypatch.setenv("QAFLORA_WEIGHTS_STRATEGY", "single:es")
    assert weighed(made.folder) == "single:es"
    assert weighed(made.folder, "--strategy", "single:math") == "single:math"


def test_lists_and_flags_can_be_set_in_each_way(config, monkeypatch) -> None:
    config.write_text('raw_prompt = true\nstop = ["a b", "c"]\n', encoding="utf-8")
    read = shared_settings("run")
    assert (read.raw_prompt, read.stop) == (True, ("a b", "c"))
    config.write_text("", encoding="utf-8")
    monkeypatch.setenv("QAFLORA_RAW_PROMPT", "True")
    monkeypatch.setenv("QAFLORA_STOP", "a b\n")
    read = shared_settings("run")
    assert (read.raw_prompt, read.stop) == (True, ("a b\n",))  # one text, not cut in two


WRONG = [
    ('stratgy = "norm"', "there is no key 'stratgy' here, expected", "Did you mean strategy? Corr"),
    (
        "[chat]\ntmp = 1",
        "there is no key 'chat.tmp' here, expected one of chat.adapter_type, ",
        "Did you mean chat.temp? Correct the key, or remove it.",
    ),
    ("[weights]\ntemp = 1", "there is no key 'weights.temp' here, expected one of weights.", ""),
    ("[zzzz]\nx = 1", "there is no key 'zzzz' here", ". Correct the key, or remove it."),
    (
        "[run]\ndraft = 3",
        "the key run.draft is called guesses now. Write guesses in its place.",
        "",
    ),
    ("chat = 3", "the key chat is 3, expected a table, as in [chat]. ", "Correct it"),
    ("temp = nan", "the key temp is nan, expected a number from 0 up", ""),
    ('raw_prompt = "yes"', "the key raw_prompt is 'yes', expected true or false", ""),
    ('stop = [""]', "the key stop is [''], expected a list of texts that are not empty", ""),
    ("[run]\nctx = 0", "the key run.ctx is 0, expected a number of tokens from 1 to 16777216", ""),
    ('[convert]\nouttype = "f8"', "the key convert.outtype is 'f8', expected one of f32, f16,", ""),
    ("[serve]\napi_key = 123", "the key serve.api_key is '(secret)', expected a text", ""),
]


@pytest.mark.parametrize(("text", "told", "advice"), WRONG)
def test_wrong_setting_is_refused(config, text, told, advice) -> None:
    config.write_text(text, encoding="utf-8")
    args = ["convert", "x", "--base", "y", "-o", "z"] if "convert" in text else ["models"]
    stderr = said_by(qaflora(*args), 1)
    assert stderr.startswith(f"Error: Cannot use the settings in {config}: ")
    assert told in stderr
    assert advice in stderr


def test_wrong_variable_is_named(monkeypatch) -> None:
    monkeypatch.setenv("QAFLORA_TEMP", "hot")
    result = qaflora("run", "DIR", "hi")
    assert result.exit_code == 2
    assert result.stderr.endswith(
        "Error: Invalid value for '--temp': 'hot' is not a number from 0 up. It is the "
        "environment variable QAFLORA_TEMP; correct or unset it.\n"
    )


def expected_rows() -> list[str]:
    rows = []
    for name, option in OPTIONS.items():
        table, _, key = name.rpartition(".")
        names = ", ".join(f"`{variable}`" for variable in variables(key, table))
        kind = option.expected + ("; in the environment one text" if option.kind is tuple else "")
        rows.append(f"| `{name}` | {names} | {kind} | {meaning(option)} |")
    return rows


def test_table_of_the_documents_is_the_codes(checkout) -> None:
    text = (checkout / "docs/settings.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"`\[([a-z]+)\]`", text)) == sorted(TABLES)
    _, *rows = [line for line in text.splitlines() if line.startswith("| ")]
    others = [row for row in rows if (OTHERS & {*re.findall("QAFLORA_[A-Z_]+", row)})]
    assert [row for row in rows if row not in others] == expected_rows()
    assert len(others) == len(OTHERS)


def test_no_variable_of_the_code_is_missing_in_the_table(checkout) -> None:
    """Variables are read by name in Python, C++ and the build; the tests' own are not for users."""
    known = set(OTHERS)
    for name in OPTIONS:
        table, _, key = name.rpartition(".")
        known.update(variables(key, table))
    found: set[str] = set()
    for pattern in ("qaflora_edge/**/*.py", "patches/**/*.py", "patches/src/*"):
        for path in checkout.glob(pattern):
            read = r"(?:getenv\(|environ\.get\(|environ\[)\"(QAFLORA_[A-Z_]+)\""
            found |= set(re.findall(read, path.read_text(encoding="utf-8")))
    assert "QAFLORA_CPU_KERNELS" in found
    assert found <= known


def test_library_reads_no_options_from_the_file(made, config) -> None:
    """A program that uses Engine gets what it asked for, whatever the user's settings."""
    config.write_text('strategy = "static"\n', encoding="utf-8")
    with Engine(made.folder, n_ctx=64) as engine:
        assert engine.weights("the thing").strategy == "qa-flora"
