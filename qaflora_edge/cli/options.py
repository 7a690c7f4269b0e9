"""What weights, run, chat and bench have in common: options, prompts, the Engine they make."""

from __future__ import annotations

import functools
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qaflora_edge.cli.progress import waiting
from qaflora_edge.cli.prompts import read_text
from qaflora_edge.errors import BundleError, PromptError, RegistryError

if TYPE_CHECKING:
    from qaflora_edge.engine import Engine

LENSES, POOLS, KV_TYPES = ("norm", "raw"), ("last", "mean"), ("f16", "f32", "q8_0")
STRATEGY_HELP = (
    "How adapters are weighed: qa-flora, calibrated, cosine, euclidean, norm, norm:N, static, "
    "single:NAME, base, or manual:NAME=W,NAME=W.  [default: the bundle's]"
)


@dataclass(frozen=True)
class SharedOptions:
    """The shared options as they were given; None is the Engine's or the command's own default."""

    strategy: str | None
    lens: str | None
    pool: str | None
    probe_tail: int
    raw_prompt: bool
    ctx: int
    kv_type: str
    no_flash_attn: bool
    threads: int | None
    gpu_layers: int | None
    max_tokens: int | None
    temp: float | None
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...]

    @property
    def engine(self) -> dict[str, Any]:
        """Keywords of Engine that do not depend on a bundle's adapters."""
        return {
            "n_ctx": self.ctx,
            "threads": self.threads,
            "gpu_layers": self.gpu_layers,
            "kv_type": self.kv_type,
            "flash_attn": not self.no_flash_attn,
            "lens": self.lens,
            "pool": self.pool,
            "probe_tail": self.probe_tail,
            "seed": self.seed,
        }

    def sampling(self, *, max_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
        """Keywords of Engine.generate; the arguments are the command's own defaults."""
        return {
            "max_tokens": max_tokens if self.max_tokens is None else self.max_tokens,
            "temperature": temperature if self.temp is None else self.temp,
            "top_p": top_p if self.top_p is None else self.top_p,
            "stop": self.stop,
        }


def completed_by(name: str) -> Callable[..., Any]:
    """A function of `complete`, imported when a shell asks."""

    def complete(ctx: click.Context, param: click.Parameter, word: str) -> Any:
        from qaflora_edge.cli import complete as functions

        return getattr(functions, name)(ctx, param, word)

    return complete


class StopText(click.types.StringParamType):
    """A text that ends an answer: not empty, and taken whole out of the environment."""

    envvar_list_splitter = None

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text: str = super().convert(value, param, ctx)
        if not text:
            self.fail("the text is empty, expected one character or more.", param, ctx)
        return text

    def split_envvar_value(self, rv: str) -> tuple[str]:
        return (rv,)


# Keywords of click.argument for DIR.
BUNDLE: dict[str, Any] = {"metavar": "DIR", "shell_complete": completed_by("complete_bundle")}

_OPTIONS = (
    click.option(
        "--strategy",
        metavar="NAME",
        shell_complete=completed_by("complete_strategy"),
        help=STRATEGY_HELP,
    ),
    click.option(
        "--lens",
        type=click.Choice(LENSES),
        help="How a layer's state is read: through the final norm, or raw.  "
        "[default: the bundle's, else norm]",
    ),
    click.option(
        "--pool",
        type=click.Choice(POOLS),
        help="Weigh by the last token of the prompt, or by the mean of all.  "
        "[default: the bundle's, else last]",
    ),
    click.option(
        "--probe-tail",
        type=click.IntRange(min=0),
        default=0,
        metavar="N",
        help="Probe adapters over the last N tokens only, after the base has read the others: "
        "faster for long prompts, not exact.  [default: all tokens]",
    ),
    click.option(
        "--raw-prompt/--no-raw-prompt",
        default=False,
        help="Take the prompt as it is: no chat template.",
    ),
    click.option(
        "--ctx",
        type=click.IntRange(min=1),
        default=2048,
        show_default=True,
        help="Tokens of prompt and answer together.",
    ),
    click.option(
        "--kv-type",
        type=click.Choice(KV_TYPES),
        default="f16",
        show_default=True,
        help="Type of the KV cache.",
    ),
    click.option("--no-flash-attn/--flash-attn", default=False, help="Do not use flash attention."),
    click.option(
        "--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all cores]"
    ),
    click.option(
        "--gpu-layers",
        type=int,
        help="Layers on the GPU, where the library was built for one.  [default: all]",
    ),
    click.option(
        "--max-tokens", type=click.IntRange(min=0), help="The most tokens that are generated."
    ),
    click.option(
        "--temp", type=click.FloatRange(min=0.0), help="Temperature of sampling; 0 is greedy."
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(min=0.0, max=1.0, min_open=True),
        help="Sample from the likeliest tokens that make up this much.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0, max=2**32 - 2),
        help="Seed of sampling.  [default: a new one]",
    ),
    click.option(
        "--stop",
        type=StopText(),
        multiple=True,
        metavar="TEXT",
        help="End the answer before TEXT; repeatable.",
    ),
)


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the shared options; the command gets them as one argument `options`."""

    @functools.wraps(command)
    def collected(**kwargs: Any) -> Any:
        shared = {field.name: kwargs.pop(field.name) for field in fields(SharedOptions)}
        return command(options=SharedOptions(**shared), **kwargs)

    decorated: Callable[..., Any] = collected
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


EXIT_CODES = """\
Exit codes:
  0    it worked
  1    an expected failure: stderr says what failed, and what to do
  2    wrong usage
  130  ended by Ctrl-C"""


def example(text: str) -> str:
    """An epilog that shows how a command is used, its lines kept as they are, and how it ends."""
    lines = textwrap.indent(textwrap.dedent(text).strip(), "  ")
    return f"\b\nExample:\n{lines}\n\n\b\n{EXIT_CODES}"


def bundle_folder(text: str) -> Path:
    """The bundle that DIR names: a folder, a name in the setting `bundles`, or what was pulled."""
    folder = Path(text)
    if os.path.exists(folder):
        return folder
    from qaflora_edge.formats.hub_ref import from_address
    from qaflora_edge.hub import cache as hub_cache
    from qaflora_edge.hub.bundle_names import named_bundles

    if named := named_bundles().get(text):
        return named

    text = from_address(text)
    try:
        pulled = hub_cache.pulled_path(text)
    except RegistryError:
        return folder  # no reference at all: reported as the missing folder that it is
    if pulled is None:
        raise BundleError(
            f"Cannot open the bundle {text}: there is no such folder, and it was not pulled. "
            f"Fetch it with `qaflora pull {text}`, or give the folder of a bundle."
        )
    return pulled


def open_engine(bundle: str, options: SharedOptions) -> Engine:
    """An Engine for a bundle; on a terminal a line is shown when it takes long."""
    from qaflora_edge.engine import Engine

    folder = bundle_folder(bundle)
    with waiting(f"Loading {folder}"):
        return Engine(folder, strategy=options.strategy, **options.engine)


def read_prompt(text: str) -> str:
    """PROMPT as given, or stdin for `-` (without its last line end).

    Raises PromptError when it is empty, InputFileError when stdin is no UTF-8 or too long.
    """
    if text == "-":
        text = read_text("-").removesuffix("\n").removesuffix("\r")
    return check_prompt(text)


def check_prompt(text: str) -> str:
    """The text itself. Raises PromptError when it is empty or no Unicode text."""
    if not text.strip():
        raise PromptError("The prompt is empty; give at least one character.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # bytes of the command line that were no UTF-8
        raise PromptError(
            f"The prompt is not UTF-8 (at character {error.start}); expected text in UTF-8. "
            "Convert it, or give it on stdin with PROMPT `-`."
        ) from error
    return text


def prompt_tokens(engine: Engine, prompt: str, options: SharedOptions) -> list[int]:
    """The prompt's token ids: as a question under the chat template, or as it is."""
    if options.raw_prompt:
        return engine.tokenize(prompt)
    return engine.chat_tokens([{"role": "user", "content": prompt}])
