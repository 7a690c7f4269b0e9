"""qaflora convert"""

import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tiny
from bundles import qaflora, said_by
from click.testing import Result

from qaflora_edge.convert import adapter as convert


def run(*args: object) -> Result:
    return qaflora("convert", *args)


def test_file_that_exists_is_kept_without_force(tmp_path, base) -> None:
    folder = tiny.write_tiny_peft(tmp_path / "a", base, targets=["q_proj"], layers=[0])
    out = tmp_path / "out.gguf"
    out.write_bytes(b"older")
    result = run(folder, "--base", base.path, "-o", out)
    assert (result.exit_code, out.read_bytes()) == (1, b"older")
    assert result.stderr == (
        f"Error: Cannot write {out}: it is a file already. Choose another name, or replace it with "
        "--force.\n"
    )
    stderr = said_by(run(folder, "--base", base.path, "-o", out, "--force"))
    assert stderr == f"Wrote {out} ({out.stat().st_size / 1e6:.1f} MB).\n"


def test_the_adapter_names_the_file(tmp_path, base, monkeypatch) -> None:
    folder = tiny.write_tiny_peft(tmp_path / "a", base)
    monkeypatch.chdir(tmp_path)
    result = run(folder, "--base", base.path)
    assert result.stderr.startswith("Wrote a.gguf ("), result.stderr
    assert (tmp_path / "a.gguf").is_file()


def test_both_bases_are_named(tmp_path, base) -> None:
    config = {"base_model_name_or_path": "owner/other"}
    folder = tiny.write_tiny_peft(tmp_path / "a", base, config=config)
    result = run(folder, "--base", base.path, "-o", tmp_path / "out.gguf")
    assert result.stderr.splitlines()[1:] == [
        "Its config says that it was trained on owner/other; the base calls itself 'tiny llama 0'."
    ]


def test_names_on_the_hub_are_fetched(hub, hub_cache, tmp_path, base) -> None:
    folder = tiny.write_tiny_peft(tmp_path / "math", base)
    hub.put("owner/math", {path.name: path.read_bytes() for path in folder.iterdir()})
    hub.put("owner/base", {"q8/base.gguf": base.path.read_bytes()})
    here, there = tmp_path / "here.gguf", tmp_path / "there.gguf"
    assert run(folder, "--base", base.path, "-o", here).exit_code == 0
    result = run("owner/math", "--base", "owner/base/q8/base.gguf", "-o", there)
    assert result.exit_code == 0, result.stderr
    assert there.read_bytes() == here.read_bytes()


def test_what_cannot_be_converted_is_told(tmp_path, base) -> None:
    folder = tiny.write_tiny_peft(tmp_path / "a", base)
    adapter = tiny.write_tiny_adapter(tmp_path / "a.gguf", base)
    out = tmp_path / "out.gguf"
    result = run(folder, "--base", adapter.path, "-o", out)
    assert "as a base: metadata field llama.block_count is missing; expected a" in result.stderr
    result = run(adapter.path, "--base", base.path, "-o", out)
    assert "A GGUF is not converted: put an adapter GGUF in a bundle as it is" in result.stderr
    stderr = said_by(run(folder, "--base", base.path, "-o", "-"), 2)
    assert "a file is needed, stdout will not do" in stderr
    assert not out.exists()


def test_verify_sums_up(tmp_path, base) -> None:
    folder = tiny.write_tiny_peft(tmp_path / "a", base, targets=["q_proj", "o_proj"], layers=[1])
    arguments = (folder, "--base", base.path, "-o", tmp_path / "out.gguf", "--verify", "--force")
    verified = r"Verified 2 modules: the largest difference is [\d.e-]+, \d+% of what rounding "
    assert re.fullmatch(rf"{verified}explains, in \S+\.\n", run(*arguments).stdout)
    result = run(*arguments, "--outtype", "f32")
    assert result.stdout == "Verified 2 modules: none differs from its source.\n"


def test_wrong_conversion_is_reported_with_exit_code_1(tmp_path, base, monkeypatch) -> None:
    folder = tiny.write_tiny_peft(tmp_path / "a", base, targets=["q_proj"], layers=[0])
    original = convert.encoded_tensor

    def wrong(*args: Any) -> Any:
        encoded = original(*args)
        encoded[0, 0] = np.nan
        return encoded

    monkeypatch.setattr(convert, "encoded_tensor", wrong)
    out = tmp_path / "out.gguf"
    stderr = said_by(run(folder, "--base", base.path, "-o", out, "--verify"), 1)
    assert "The conversion is wrong: 1 of 1 modules differ" in stderr
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [None, "3"])
def test_products_use_one_thread_unless_the_user_chose(chosen) -> None:
    """The variable is set before numpy, which reads it, is loaded."""
    code = (
        "import os, sys; from qaflora_edge.cli import main\n"
        "sys.argv = ['qaflora', 'convert', 'nowhere', '--base', 'nowhere', '-o', 'nowhere']\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, os.environ.get('OPENBLAS_NUM_THREADS'))\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    env |= {} if chosen is None else {"OPENBLAS_NUM_THREADS": chosen}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == f"1 {chosen or '1'}\n"
