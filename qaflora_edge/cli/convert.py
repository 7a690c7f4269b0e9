"""qaflora convert"""

import functools
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qaflora_edge.cli.answers import print_json
from qaflora_edge.cli.options import adapter_pairs, choose_base, command, own_options
from qaflora_edge.cli.progress import progress_bars
from qaflora_edge.errors import ConversionError, OutputFileError
from qaflora_edge.files import what_is_at
from qaflora_edge.formats.names import plain_name


@command(
    "qaflora convert my-peft-adapter --base base.gguf",
    "qaflora convert my-peft-adapter --base base.gguf -o adapter.gguf --verify",
)
@click.argument("peft_dir")
@click.option(
    "--base",
    metavar="BASE.gguf",
    help="The base that the adapter was trained on: a file, the name of a registry model that was "
    "pulled, or a Hub reference (owner/name/file.gguf).  [default: what the adapter names]",
)
@click.option(
    "-o",
    "--output",
    metavar="OUT.gguf",
    type=click.Path(path_type=Path),
    help="The file to write.  [default: the adapter's name, in this folder]",
)
@own_options
@click.option("--force", is_flag=True, help="Replace OUT.gguf where it exists.")
@click.option(
    "--verify",
    is_flag=True,
    help="Read the file back, compare the delta of each module with the source, and report the "
    "largest difference; --json has it for each module. The file is kept only if rounding to its "
    "type explains them all.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print what was written as one JSON object on stdout."
)
def convert(
    peft_dir: str,
    base: str | None,
    output: Path | None,
    outtype: str,
    force: bool,
    verify: bool,
    as_json: bool,
) -> None:
    """Convert a PEFT adapter to an adapter GGUF.

    PEFT_DIR holds adapter_config.json and adapter_model.safetensors, as PEFT, unsloth, axolotl and
    others save them, or adapters.safetensors of MLX. Of a folder with one sub-folder for each
    adapter, give PEFT_DIR/NAME. A Hub reference (owner/name) is fetched first. A feature that a
    plain LoRA cannot represent is refused by its name, and nothing is written then.
    """
    _use_one_blas_thread()
    from qaflora_edge.bundles.source import find_adapter, find_base
    from qaflora_edge.convert.adapter import convert_adapter

    if str(output) == "-":
        raise click.BadParameter("a file is needed, stdout will not do", param_hint="-o")
    if output is None:
        [(name, _)] = adapter_pairs([peft_dir])
        output = Path(f"{name}.gguf")
    if not force and os.path.lexists(output):
        raise OutputFileError(
            f"Cannot write {output}: it {what_is_at(output)} already. Choose another name, or "
            "replace it with --force."
        )
    base = choose_base(base, [peft_dir])
    label = "Converting and verifying" if verify else "Converting"
    try:
        with progress_bars() as tell:
            source = find_adapter(peft_dir)
            converted = convert_adapter(
                source.path,
                find_base(base)[0],
                output,
                outtype=outtype,
                verify=verify,
                name=source.name if source.hub else None,
                progress=functools.partial(tell, label),
            )
    except ConversionError as error:
        _print_report({"path": None, "checks": [asdict(check) for check in error.checks]}, as_json)
        raise
    report = asdict(converted)
    _print_report({**report, "path": str(output)}, as_json)
    click.echo(f"Wrote {output} ({report['size_bytes'] / 1e6:.1f} MB).", err=True)
    trained_on = report["trained_on"]
    base_name = report["base_name"]
    names = {plain_name(name) for name in (base_name, base) if name}
    if trained_on and base_name and plain_name(trained_on) not in names:
        click.echo(
            f"Its config says that it was trained on {trained_on}; the base calls itself "
            f"{base_name[:200]!r}.",
            err=True,
        )


def _use_one_blas_thread() -> None:
    """Keep numpy's products in one thread, unless the user chose a number.

    OpenBLAS waits for its threads by spinning. Where other programs keep the cores busy, verifying
    took 16 times as long with two threads; where none do, the second gains little.
    """
    if "numpy" not in sys.modules:  # it is read when numpy is loaded
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _print_report(report: dict[str, Any], as_json: bool) -> None:
    """Print the largest difference that the checks found; with JSON, the whole report."""
    checks = [{**check, "is_right": check["of_allowed"] <= 1.0} for check in report["checks"]]
    if as_json:
        for check in checks:  # JSON has neither NaN nor infinity
            numbers = [key for key, value in check.items() if isinstance(value, float)]
            check |= {key: None for key in numbers if not math.isfinite(check[key])}
        print_json({**report, "checks": checks})
    elif checks and report["path"]:  # else the error says what is wrong
        worst = max(checks, key=lambda check: check["of_allowed"])
        found = "none differs from its source"
        if worst["of_allowed"] > 0:
            found = (
                f"the largest difference is {worst['largest_difference']:.2g}, "
                f"{worst['of_allowed']:.0%} of what rounding explains, in {worst['module']}"
            )
        click.echo(f"Verified {len(checks)} modules: {found}.")
