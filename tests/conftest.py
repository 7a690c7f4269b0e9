"""Shared fixtures. Nothing here loads a library or fetches a file before a test asks for it."""

import os
from pathlib import Path

import pytest

import qaflora_edge
from qaflora_edge import registry


def pytest_configure() -> None:
    """Keep the checkout off the path of `python -c` that a test runs, as it is off ours."""
    os.environ["PYTHONSAFEPATH"] = "1"


def pytest_report_header() -> str:
    """Say which package is tested: it should be an installed one, not the checkout."""
    return f"qaflora_edge: {Path(qaflora_edge.__file__).parent}"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The SmolLM2 base of the demo (98 MB), fetched into the cache once per machine."""
    return registry.fetch_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The source checkout that these tests lie in."""
    return Path(__file__).resolve().parents[1]
