"""Shared fixtures. Nothing here loads a library or fetches a file before a test asks for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import pytest
from browser import Browser, browser
from hubs import FakeHub

import qaflora_edge
from qaflora_edge.cli.settings import SHARED, SHARED_TABLES, variables
from qaflora_edge.files import cache_dir
from qaflora_edge.hub import fetch_model

if TYPE_CHECKING:
    from bundles import TinyBundle
    from desk import Desk
    from starlette.testclient import TestClient
    from tiny import TinyBase

    from qaflora_edge import Engine
    from qaflora_edge.backend.model import Model


def pytest_configure(config: pytest.Config) -> None:
    """Keep the checkout off the path of `python -c` that a test runs, as it is off ours.

    The cache of the user serves the tests; other settings of theirs, and of their terminal or the
    service that runs them, would change them. A shell lets what it starts in the background ignore
    Ctrl-C, and so would all that the tests start.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ["QAFLORA_CACHE"] = str(cache_dir())
    os.environ["QAFLORA_CONFIG"] = os.devnull
    for name in ("QAFLORA_BUNDLES", "FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES"):
        os.environ.pop(name, None)
    for key in SHARED:
        for table in (None, *SHARED_TABLES):
            for name in variables(key, table):
                os.environ.pop(name, None)
    if config.getoption("numprocesses", None):
        take_one_thread_each()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors: a worker waits a fifth of its time, for no processor."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) + 1
    return (os.cpu_count() or 1) + 1


# Strategies of benchmarks/published.py are tested as those of the package.
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))


def take_one_thread_each() -> None:
    """Let every worker of `pytest -n 2`, and all that it starts, compute with one thread.

    There are more workers than processors: their threads would wait for each other. The Engine,
    torch and OpenBLAS read this.
    """
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"


# Files that import torch, which takes seconds, and files that open the browser.
IMPORTING = "architectures convert benchmarks peft recipes reference spectral"
BROWSER = "page_browser page_hostile page_server"
LONG = "transcript docs worker"  # single tests of many seconds: none of them is to be the last


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with these files: the first of several workers runs them all, and loads each once."""
    first = [f"test_{name}.py" for name in f"{IMPORTING} {BROWSER} {LONG}".split()]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else 99)


def pytest_unconfigure() -> None:
    """Close what llama_cpp opens when it is imported, or Python warns of it as it ends."""
    if utils := sys.modules.get("llama_cpp._utils"):
        utils.outnull_file.close()
        utils.errnull_file.close()


def pytest_report_header() -> str:
    """Say which package is tested: it should be an installed one, not the checkout."""
    return f"qaflora_edge: {Path(qaflora_edge.__file__).parent}"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The SmolLM2 base of the demo (98 MB), fetched into the cache once per machine."""
    return fetch_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The source checkout that these tests lie in."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def base(tmp_path) -> TinyBase:
    """A tiny base of a test's own."""
    from tiny import write_tiny_base

    return write_tiny_base(tmp_path / "base.gguf")


@pytest.fixture
def adapters(base) -> dict[str, Path]:
    """Three adapters of that base: name -> file."""
    from tiny import write_tiny_adapters

    return write_tiny_adapters(base, ("math", "es", "med"))


@pytest.fixture(scope="module")
def model(made) -> Iterator[Model]:
    """A tiny base that is loaded."""
    from qaflora_edge.backend.model import Model
    from qaflora_edge.formats.base import read_base

    with Model(read_base(made.base.path)) as model:
        yield model


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> TinyBundle:
    """A tiny bundle that no test changes, not calibrated."""
    from bundles import make_bundle

    return make_bundle(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory) -> TinyBundle:
    """A tiny bundle that no test changes, with all that is measured of its adapters."""
    from bundles import make_bundle

    return make_bundle(tmp_path_factory.mktemp("calibrated"), calibrate=True)


@pytest.fixture(scope="module")
def served(calibrated) -> TinyBundle:
    """The bundle of `client` and `alone`; a module may have another one."""
    return calibrated


@pytest.fixture(scope="module")
def client(served) -> Iterator[TestClient]:
    """A server of that bundle, without a network."""
    from serving import client_of

    with client_of(served.folder) as client:
        yield client


@pytest.fixture(scope="module")
def alone(served) -> Iterator[Engine]:
    """An Engine of that bundle with the server's options, whose answers are the server's."""
    from serving import ENGINE

    from qaflora_edge import Engine

    with Engine(served.folder, **ENGINE) as engine:  # type: ignore[arg-type]
        yield engine


@pytest.fixture(scope="session")
def chromium(tmp_path_factory) -> Iterator[Browser]:
    """The browser of all tests; `window` gives it as new."""
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def window(chromium) -> Browser:
    """A window of Chromium as it is when nothing has been opened."""
    chromium.reset()
    return chromium


@pytest.fixture
def desk(window) -> Iterator[Desk]:
    """The page of a scripted server, opened for the first time."""
    from desk import desk_at

    with desk_at(window) as made:
        yield made


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A stand-in of the Hub on this machine, empty."""
    with FakeHub() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """An empty cache in place of the user's."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QAFLORA_CACHE", str(path))
    return path


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    """An empty settings file in place of the user's."""
    path = tmp_path / "config.toml"
    path.touch()
    monkeypatch.setenv("QAFLORA_CONFIG", str(path))
    return path


@pytest.fixture
def hub_cache(hub, tmp_path, monkeypatch) -> Iterator[Path]:
    """Let this process use that Hub, with no token and an empty cache, which is given.

    The Hub's library reads the environment once, when it is imported; so what it read is replaced.
    """
    import huggingface_hub
    from huggingface_hub import constants

    home = tmp_path / "hf"
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    yield home / "hub"
    huggingface_hub.close_session()


@pytest.fixture(scope="session")
def llama_cpp_source(checkout) -> Path:
    """The pinned source of llama.cpp, as a build takes it."""
    prepare = [sys.executable, str(checkout / "patches" / "prepare.py")]
    done = subprocess.run(prepare, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())
