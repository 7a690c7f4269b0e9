"""qaflora convert"""

from __future__ import annotations

from pathlib import Path

import click

from qaflora_edge.cli.options import example

OUTTYPES = ("f32", "f16", "bf16", "q8_0")


@click.command(
    epilog=example(
        """
        qaflora convert my-peft-adapter --base base.gguf -o adapter.gguf
        """
    )
)
@click.argument("peft_dir", type=click.Path(path_type=Path))
@click.option(
    "--base",
    required=True,
    metavar="BASE.gguf",
    type=click.Path(path_type=Path),
    help="The base that the adapter was trained on.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT.gguf",
    type=click.Path(path_type=Path),
    help="The file to write.",
)
@click.option(
    "--outtype",
    type=click.Choice(OUTTYPES),
    default="f16",
    show_default=True,
    help="Type of the adapter's tensors.",
)
def convert(peft_dir: Path, base: Path, output: Path, outtype: str) -> None:
    """Convert a PEFT adapter to an adapter GGUF.

    PEFT_DIR holds adapter_config.json and adapter_model.safetensors. A feature that a plain LoRA
    cannot represent is refused by its name, and nothing is written then.
    """
    from qaflora_edge.convert import convert_adapter

    convert_adapter(peft_dir, base, output, outtype=outtype)
    click.echo(f"Wrote {output} ({output.stat().st_size / 1e6:.1f} MB).", err=True)
