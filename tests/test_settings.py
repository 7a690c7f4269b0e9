"""The settings file: where it is, what it may hold, and what a wrong one is told."""

import os
import sys
from pathlib import Path

import pytest
from refusals import refused

from qaflora_edge import files
from qaflora_edge.config import bundle_places, cache_setting, read_settings, settings_path
from qaflora_edge.errors import SettingsError


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the XDG folders are for others")
def test_file_lies_in_the_users_config_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("QAFLORA_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert settings_path() == tmp_path / "qaflora-edge/config.toml"
    assert read_settings() == {}
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings_path() == tmp_path / ".config/qaflora-edge/config.toml"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_values_are_read(config, encoding) -> None:
    config.write_text('strategy = "norm"\n[chat]\ntemp = 1\n', encoding=encoding)
    assert read_settings() == {"strategy": "norm", "chat": {"temp": 1}}


def test_cache_is_the_environments_then_the_files(config, monkeypatch) -> None:
    monkeypatch.delenv("QAFLORA_CACHE")
    config.write_text('cache = "models"\n', encoding="utf-8")
    assert files.cache_dir() == cache_setting() == config.parent / "models"
    monkeypatch.setenv("QAFLORA_CACHE", "/elsewhere")
    assert files.cache_dir() == Path("/elsewhere")


def test_bundle_places_are_the_environments_then_the_files(config, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config.write_text('bundles = ["~/bundles", "near", "/far"]\n', encoding="utf-8")
    ours = Path("/home/me/bundles").expanduser()
    assert bundle_places() == [ours, config.parent / "near", Path("/far")]
    monkeypatch.setenv("QAFLORA_BUNDLES", os.pathsep.join(["/a", "/b"]))
    assert bundle_places() == [Path("/a"), Path("/b")]


def message(config: Path) -> str:
    return refused(SettingsError, read_settings).replace(str(config), "FILE")


def test_missing_file_that_was_named(config) -> None:
    config.unlink()
    assert message(config) == (
        "Cannot read the settings in FILE: it does not exist; expected TOML in UTF-8, with lines "
        'such as strategy = "calibrated". Correct or remove the file, or set QAFLORA_CONFIG '
        "to another one."
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_named_pipe_is_not_waited_for(config) -> None:
    config.unlink()
    os.mkfifo(config)
    assert "it is no plain file" in message(config)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"strategy = norm", "(at line 1"),
        (b"\xff\xfe", "can't decode byte 0xff"),
        (b"a = " + b"[" * 100_000, ""),
        (b"#" * ((1 << 20) + 1), "it has more than 1048576 bytes"),
    ],
)
def test_file_that_is_no_toml(config, data, reason) -> None:
    config.write_bytes(data)
    assert reason in message(config)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("cache = 3", "cache is 3, expected the path of a folder, as a text"),
        ('bundles = "x"', "bundles is 'x', expected a list of paths of folders, as texts"),
    ],
)
def test_library_keys_of_the_wrong_type(config, line, told) -> None:
    config.write_text(line, encoding="utf-8")
    assert message(config) == (
        f"Cannot use the settings in FILE: the key {told}. Correct it, or remove it for the "
        "default."
    )
