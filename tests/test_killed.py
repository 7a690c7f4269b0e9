"""Killed at many moments, nothing that is half-written is taken for whole."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from hashlib import sha256
from pathlib import Path

import pytest
import tiny
from bundles import bundle_json, make_bundle, rewrite
from patience import PATIENCE_S, python, wait_until

SMALL = {"targets": ("q_proj",), "layers": (0,), "rank": 2}
EVERY = 1 << 20  # moments

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="Windows has neither fork nor SIGKILL"),
]


def killed(script: str, *args: object, most: int, **env: str) -> dict[str, int]:
    """Run a script that defines `action` and `check`; give what at_many_points counted."""
    program = f"""
import json, sys
from pathlib import Path
from killed import at_many_points
start, place, most = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
{textwrap.dedent(script)}
print(json.dumps(at_many_points(start, place, action, check, most)))
"""
    start, place, *rest = args
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    result = python("-c", program, start, place, most, *rest, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    counted: dict[str, int] = json.loads(result.stdout)
    return counted


@pytest.fixture
def start(tmp_path, monkeypatch) -> Path:
    """A folder with a base, a PEFT folder, an adapter GGUF and a bundle, all relative."""
    monkeypatch.setenv("QAFLORA_CACHE", str(tmp_path / "cache"))
    start = tmp_path / "start"
    start.mkdir()
    made = make_bundle(start, n_layer=1)
    tiny.write_tiny_peft(made.peft, made.base, **SMALL)
    shutil.copy(made.base.path, made.folder)  # what it names elsewhere counts there alone
    rewrite(made.folder, lambda raw: raw["base"].update(file="base.gguf"))
    (tmp_path / "place").mkdir()
    return start


CONVERT = """
from qaflora_edge.convert.adapter import convert_adapter

convert_adapter(start / "peft", start / "base.gguf", start / "whole.gguf")
whole = (start / "whole.gguf").read_bytes()

def action(copy):
    convert_adapter(copy / "peft", copy / "base.gguf", copy / "out" / "math.gguf")

def check(copy):
    out = copy / "out" / "math.gguf"
    content = out.read_bytes() if out.exists() else None
    assert content in (BEFORE, whole)
    return content == whole
"""


@pytest.mark.parametrize("before", [None, b"old"])
def test_convert(start, tmp_path, before) -> None:
    (start / "out").mkdir()
    if before is not None:
        (start / "out" / "math.gguf").write_bytes(before)
    script = f"BEFORE = {before!r}\n{CONVERT}"
    counted = killed(script, start, tmp_path / "place", most=EVERY)
    assert counted["killed"] == counted["calls"] > 15
    assert 0 < counted["done"] < counted["killed"]  # killed on either side of the one step


def test_create(start, tmp_path) -> None:
    counted = killed(
        """
        from qaflora_edge.bundles.open import verify_bundle
        from qaflora_edge.bundles.create import create_bundle

        def action(copy):
            create_bundle(
                copy / "new",
                copy / "base.gguf",
                {"a": copy / "peft", "b": copy / "es.gguf"},
            )

        def check(copy):
            if not (copy / "new").exists():
                return False
            assert list(verify_bundle(copy / "new").adapter_paths) == ["a", "b"]
            return True
        """,
        start,
        tmp_path / "place",
        most=12,
    )
    assert counted["killed"] > 8


EDIT = """
import filelock  # once, not in every fork

from qaflora_edge.bundles import edit as bundle_edit
from qaflora_edge.bundles.open import verify_bundle

def action(copy):
    {action}

def check(copy):
    folder = copy / "bundle"
    files = verify_bundle(folder).adapter_paths
    names = list(files)
    assert names in (["math", "es"], {names})
    return names == {names}
"""


@pytest.mark.parametrize(
    ("action", "names"),
    [
        ('bundle_edit.add_adapters(copy / "bundle", {"c": copy / "peft"})', ["math", "es", "c"]),
        ('bundle_edit.remove_adapter(copy / "bundle", "es")', ["math"]),
    ],
)
def test_an_edit(start, tmp_path, action, names) -> None:
    script = EDIT.format(action=action, names=names)
    counted = killed(script, start, tmp_path / "place", most=12)
    assert counted["killed"] > 8
    assert counted["done"] < counted["killed"]


PULL = """
import os
from qaflora_edge.formats import names
from qaflora_edge.hub import fetch_model
from huggingface_hub import HfApi, constants, hf_hub_download  # once, not in every fork

names.package_data = lambda name: place.parent / "registry.json"

def action(copy):
    constants.HF_HUB_CACHE = str(copy / "hub")
    os.environ["QAFLORA_CACHE"] = str(copy)
    fetch_model("fake")

def check(copy):
    path = copy / "models" / "base.gguf"
    assert not path.exists() or path.stat().st_size == 3 << 20
    return path.exists()
"""


@pytest.fixture
def pulled(hub, start, tmp_path, checkout) -> dict[str, str]:
    """The environment of a process that may pull owner/bundle, and the model `fake`."""
    raw = bundle_json(start / "bundle")
    raw["base"]["file"] = str(start / "base.gguf")
    adapters = [f"adapters/{name}.gguf" for name in ("math", "es")]
    files = {name: (start / "bundle" / name).read_bytes() for name in adapters}
    hub.put("owner/bundle", {"bundle.json": json.dumps(raw).encode(), **files})
    base = os.urandom(3 << 20)
    hub.put("owner/base", {"base.gguf": base})
    registry = json.loads((checkout / "models" / "registry.json").read_text())
    entry = registry["models"]["gemma-3-270m"]
    entry |= {"file": "base.gguf", "sha256": sha256(base).hexdigest(), "size_bytes": len(base)}
    hub_ref = {"repo": "owner/base", "revision": None, "file": "base.gguf"}
    registry["models"] = {"fake": entry | {"hub": hub_ref}}
    (tmp_path / "registry.json").write_text(json.dumps(registry))
    (tmp_path / "empty").mkdir()
    hf = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    return hf | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


def test_pull(pulled, tmp_path) -> None:
    counted = killed(PULL, tmp_path / "empty", tmp_path / "place", most=8, **pulled)
    assert counted["killed"] >= 7


def test_pull_in_the_middle_of_a_file(hub, pulled, tmp_path) -> None:
    """The command itself, by SIGKILL; again, it fetches what is missing."""
    started: list[subprocess.Popen[bytes]] = []
    big = os.urandom(24 << 20)  # the Hub's library writes 10 MB at a time
    files = hub.files("owner/bundle")
    raw = json.loads(files["bundle.json"])
    raw["adapters"][1]["sha256"] = sha256(big).hexdigest()
    new = {"bundle.json": json.dumps(raw).encode(), "adapters/es.gguf": big}
    hub.put("owner/bundle", {**files, **new})

    def halfway(path: str) -> None:
        if path.endswith("es.gguf") and len(started) == 1:
            wait_until(lambda: any(p.stat().st_size for p in tmp_path.rglob("*.incomplete")))
            started[0].kill()

    hub.halfway = halfway
    command = [sys.executable, "-m", "qaflora_edge", "pull", "owner/bundle"]
    for code in (-signal.SIGKILL, 0):
        process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | pulled)
        started.append(process)
        assert process.wait(PATIENCE_S) == code
        whole = [path for path in tmp_path.rglob("es.gguf") if "start" not in path.parts]
        assert len(whole) == (code == 0)
    assert whole[0].read_bytes() == big
