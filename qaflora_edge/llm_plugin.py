"""The plugin for the program `llm`: `llm -m qaflora/BUNDLE`.

`llm` imports this module at every start, so an Engine is imported when a prompt comes, and stays
open for the next one.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import llm
from llm.parts import Message, ReasoningPart, TextPart
from pydantic import Field

from qaflora_edge.errors import PromptError, QafloraError
from qaflora_edge.hub.bundle_names import named_bundles, pulled_bundles

if TYPE_CHECKING:
    from qaflora_edge.cli.options import SharedOptions
    from qaflora_edge.engine import Engine

PREFIX = "qaflora/"
MAX_TOKENS = 512  # as `qaflora run`


@llm.hookimpl
def register_models(register: Any) -> None:
    """Offer the bundles that have a name: those of the setting `bundles`, and those pulled."""
    try:
        bundles = {**pulled_bundles(), **named_bundles()}
    except QafloraError as error:  # must not keep `llm` from its other models
        click.echo(f"qaflora: no models: {error}", err=True)
        return
    for name, folder in bundles.items():
        register(BundleModel(name, folder))


class BundleModel(llm.Model):
    """One bundle as a model of `llm`."""

    can_stream = True
    supports_schema = True

    class Options(llm.Options):  # type: ignore[misc, unused-ignore]
        """What `-o NAME VALUE` sets; without it the settings of qaflora hold, table [llm]."""

        strategy: str | None = Field(
            default=None, description="How adapters are weighed, such as calibrated or single:NAME"
        )
        lens: str | None = Field(default=None, description="norm or raw")
        pool: str | None = Field(default=None, description="last or mean")
        temperature: float | None = Field(default=None, ge=0, description="0 is greedy")
        top_p: float | None = Field(
            default=None, gt=0, le=1, description="Sample from the likeliest tokens of this much"
        )
        max_tokens: int | None = Field(
            default=None, ge=0, description=f"The most tokens of an answer, {MAX_TOKENS} by default"
        )
        seed: int | None = Field(default=None, ge=0, lt=2**32 - 1, description="Seed of sampling")
        stop: str | None = Field(default=None, min_length=1, description="Text that ends an answer")

    def __init__(self, name: str, folder: Path) -> None:
        self.model_id = f"{PREFIX}{name}"
        self.folder = folder

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
    ) -> Iterator[str]:
        """Answer; the weights and the times are in response_json, and so in the logs."""
        from qaflora_edge.cli.setting_table import shared_settings

        given: Any = prompt.options
        schema: Any = prompt.schema  # llm has turned a class into a schema by now
        settings = shared_settings("llm")
        engine = opened(self.folder, settings, lens=given.lens, pool=given.pool)
        sampling = settings.sampling(max_tokens=MAX_TOKENS, temperature=0.0, top_p=1.0)
        chosen = {
            "max_tokens": given.max_tokens,
            "temperature": given.temperature,
            "top_p": given.top_p,
            "seed": given.seed,
            "stop": None if given.stop is None else (given.stop,),
        }
        sampling |= {name: value for name, value in chosen.items() if value is not None}
        answer = engine.generate(
            engine.chat_tokens([chat_message(message) for message in prompt.messages]),
            weights=given.strategy or settings.strategy,
            json_schema=schema,
            **sampling,
        )
        yield from answer
        response.set_usage(input=answer.n_prompt, output=answer.n_completion)
        response.response_json = {
            "base": engine.name,
            "finish_reason": answer.finish_reason,
            "fusion": answer.fusion.to_dict(),
            "timings": answer.timings.to_dict(),
        }


def chat_message(message: Message) -> dict[str, str]:
    """A message of `llm` as a template takes it; reasoning of another model is left out.

    Raises PromptError for what is no text, such as a tool's call.
    """
    texts = []
    for part in message.parts:
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif not isinstance(part, ReasoningPart):
            raise PromptError(
                f"A message of the {message.role} holds a {type(part).__name__}, expected text: "
                "a bundle reads text only. Begin a new conversation, or use another model."
            )
    return {"role": message.role, "content": "".join(texts)}


_open: dict[tuple[Any, ...], Engine] = {}


def opened(folder: Path, settings: SharedOptions, *, lens: str | None, pool: str | None) -> Engine:
    """An Engine for a bundle: the one that is open when it is the same, else a new one."""
    from qaflora_edge.engine import Engine

    keywords = settings.engine
    keywords |= {name: value for name, value in (("lens", lens), ("pool", pool)) if value}
    key = (folder, *sorted(keywords.items()))
    if key not in _open:
        close_all()
        _open[key] = Engine(folder, **keywords)
    return _open[key]


@atexit.register
def close_all() -> None:
    """Close the Engine that is open; one at a time is enough memory."""
    while _open:
        _open.popitem()[1].close()
