"""Options are the same on the command line, in the settings and in Python."""

import inspect
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from bundles import shared_settings
from click.testing import CliRunner
from refusals import refused

from qaflora_edge import Engine, config
from qaflora_edge.ask import Sampling
from qaflora_edge.cli import main
from qaflora_edge.cli.options import SharedOptions
from qaflora_edge.cli.settings import SHARED_TABLES, file_settings, shared_by
from qaflora_edge.config import OPTIONS, SHARED, Option, in_group
from qaflora_edge.dialects.options import read_body
from qaflora_edge.dialects.texts import TextBody
from qaflora_edge.errors import OptionError, SettingsError

BY_NAME = {option.name: option for option in OPTIONS}
COMMANDS = SHARED_TABLES
NEEDED = {"compare": ["QUESTION"], "eval": ["TASK"], "export": ["-o", "OUT"], "weights": ["PROMPT"]}
# Options with a flag that are texts of any kind, or numbers without a range.
TEXTS: Mapping[str, tuple[list[Any], list[Any]]] = {
    "strategy": (["spectr", "manual:a=1"], []),
    "rpc": (["127.0.0.1:50052", "a:1,b:2"], []),
    "tensor_split": (["1", "3,1.5"], []),
    "gpu_layers": ([-1, 0, 99], ["many"]),
}


def good_and_bad(option: Option) -> tuple[list[Any], list[Any]]:
    """Values at the ends of an option's range, and beyond them."""
    if option.name in TEXTS:
        return TEXTS[option.name]
    if option.choices:
        return [*option.choices], ["none of them"]
    step = 1 if option.kind is int else 0.001
    assert option.low is not None
    low, beyond = option.low, option.low - step
    if option.is_open:
        low, beyond = option.low + step, option.low
    good, bad = [*option.words, low], [beyond, "x"]
    if option.high is None:
        good.append(option.kind(1e9))
    else:
        good.append(option.kind(option.high))
        bad.append(option.high + step)
    return good, bad


def test_ends_of_a_range() -> None:
    assert good_and_bad(BY_NAME["guesses"]) == (["auto", 0, 15], [-1, "x", 16])
    assert good_and_bad(BY_NAME["repeat_penalty"]) == ([0.001, 100.0], [0.0, "x", 100.001])


@pytest.mark.parametrize("name", [o.name for o in SHARED.values() if o.kind not in (bool, tuple)])
def test_range_is_the_same_everywhere(name, tmp_path, monkeypatch) -> None:
    for is_good, values in zip((True, False), good_and_bad(BY_NAME[name]), strict=True):
        for value in values:
            refused = refusals(BY_NAME[name], value, tmp_path / "config.toml", monkeypatch)
            assert refused == dict.fromkeys(refused, not is_good), value


def refusals(
    option: Option, value: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, bool]:
    """Which ways to give an option refuse a value."""
    key, refused = option.key, {}
    for verb in (each for each in COMMANDS if key in shared_by(each)):
        line = [f"{option.flag}={value}", "DIR", *NEEDED.get(verb, ())]
        refused[verb] = fails(click.BadParameter, find_command(verb).make_context, "", line)

    path.write_text(f"{key} = {value!r}\n", encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setenv("QAFLORA_CONFIG", str(path))
        refused["file"] = fails(SettingsError, file_settings)
        patched.setenv("QAFLORA_CONFIG", os.devnull)
        patched.setenv(f"QAFLORA_{key}".upper(), str(value))
        refused["environment"] = fails(click.BadParameter, shared_settings, "run")

    for group in option.groups.split():
        refused[group] = fails(OptionError, config.check, group, {option.name: value})
    if "sampling" in option.groups:
        refused["sampling"] = fails(OptionError, Sampling().updated, {option.name: value})
        body = {"prompt": "a", option.name: value}
        refused["HTTP"] = fails(OptionError, read_body, TextBody, body)
    return refused


def fails(error: type[Exception], call: Any, *args: Any, **keywords: Any) -> bool:
    try:
        call(*args, **keywords)
    except error:
        return True
    return False


def find_command(verb: str) -> click.Command:
    command = main.get_command(click.Context(main), verb)
    assert command is not None
    return command


def python_defaults(call: Any) -> dict[str, Any]:
    """Parameters of a call that are options, and their defaults."""
    parameters = inspect.signature(call).parameters
    return {name: parameters[name].default for name in parameters if name in BY_NAME}


def test_defaults_of_python_calls() -> None:
    defaults = {name: option.default for name, option in BY_NAME.items()}
    engine = python_defaults(Engine.__init__)
    assert engine.keys() == in_group("engine").keys()
    assert {field.name for field in fields(Sampling)} == in_group("sampling").keys()
    sampling = {field.name: field.default for field in fields(Sampling)}
    generate = python_defaults(Engine.generate)
    assert generate.keys() <= {"strategy", "prefill", *sampling}
    for found in (engine, sampling, generate, python_defaults(Engine.chat)):
        assert found == {name: defaults[name] for name in found}


def test_engine_refuses_before_it_loads(tmp_path) -> None:
    for options, message in (
        ({"n_ctx": 0}, "Option n_ctx is 0, expected a number of tokens from 1 to 16777216."),
        ({"flash_attn": "no"}, "Option flash_attn is 'no', expected true or false."),
        ({"gpu_layers": 1.5}, "Option gpu_layers is 1.5, expected a whole number."),
        ({"seed": -1}, "Option seed is -1, expected a whole number from 0 to 4294967294."),
    ):
        assert refused(OptionError, Engine, tmp_path / "none", **options) == message


@pytest.mark.parametrize("value", [float("nan"), "1", True])
def test_what_is_no_number_is_refused(value) -> None:
    told = refused(OptionError, config.check, "sampling", {"temperature": value})
    assert told == f"Option temperature is {value!r}, expected a number from 0 up."


def test_negated_flag_is_the_keyword_in_python(tmp_path, monkeypatch) -> None:
    assert shared_settings("run").engine["flash_attn"] is None
    path = tmp_path / "config.toml"
    path.write_text("no_flash_attn = true\n", encoding="utf-8")
    monkeypatch.setenv("QAFLORA_CONFIG", str(path))
    assert shared_settings("run").engine["flash_attn"] is False
    monkeypatch.setenv("QAFLORA_NO_FLASH_ATTN", "false")
    assert shared_settings("run").engine["flash_attn"] is True


def test_options_of_the_command_line_reach_the_sampler(made) -> None:
    options: dict[str, Any] = {"stop": ("xyzzy", "plugh"), "max_tokens": 16, "temperature": 1.5}
    for name, option in in_group("sampling").items():
        if option.flag and name not in options:
            _, high = good_and_bad(option)[0]
            options[name] = option.kind(high / 2)
            assert options[name] != option.default
    line = [str(made.folder), "the thing", "--raw-prompt"]
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        line += [f"{BY_NAME[name].flag}={each}" for each in values]
    params = find_command("run").make_context("", list(line)).params
    assert SharedOptions(**{key: params[key] for key in SHARED}).sampling == Sampling(**options)
    result = CliRunner().invoke(main, ["run", *line])
    with Engine(made.folder) as engine:
        expected = engine.generate("the thing", **options).text()
    assert (result.exit_code, result.stdout) == (0, expected + "\n")
