"""The plugin for the program `llm`: `llm -m qaflora/BUNDLE`.

`llm` imports this at every start. An Engine is imported with the first prompt, and stays open.
"""

import atexit
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
import llm
from llm.parts import Message, ReasoningPart, TextPart
from pydantic import Field, create_model

from qaflora_edge.config import Option, in_group
from qaflora_edge.errors import PromptError, QafloraError
from qaflora_edge.hub import named_bundles, pulled_bundles

if TYPE_CHECKING:
    from qaflora_edge.engine import Engine

_WEIGHING = in_group("weighing")
_SAMPLING = {name: option for name, option in in_group("sampling").items() if option.flag}
_BASE: Any = llm.Options  # two classes of that name are one to a type checker, and not to another


@llm.hookimpl
def register_models(register: Any) -> None:
    """Offer the bundles that have a name: those of the setting `bundles`, and those pulled."""
    try:
        bundles = pulled_bundles() | named_bundles()
    except QafloraError as error:  # must not keep `llm` from its other models
        click.echo(f"qaflora: no models: {error}", err=True)
        return
    for name, folder in bundles.items():
        register(BundleModel(name, folder))


def _field(option: Option) -> Any:
    kind: Any = Literal[option.choices] if option.choices else option.kind
    return (str if kind is tuple else kind) | None, Field(
        default=None,
        description=option.help.partition(": {")[0].removesuffix("."),
        ge=None if option.is_open else option.low,
        gt=option.low if option.is_open else None,
        le=option.high,
        min_length=1 if kind is tuple else None,
    )


class BundleModel(llm.Model):
    """One bundle as a model of `llm`."""

    can_stream = True
    supports_schema = True

    # What `-o NAME VALUE` sets; without it the settings of qaflora hold, table [llm].
    Options = create_model(
        "Options",
        __base__=_BASE,
        **{name: _field(option) for name, option in (_WEIGHING | _SAMPLING).items()},
    )

    def __init__(self, name: str, folder: Path) -> None:
        self.model_id = f"qaflora/{name}"
        self.folder = folder

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None,
    ) -> Iterator[str]:
        """Answer; the weights and the times are in response_json, and so in the logs."""
        from qaflora_edge.ask import Ask, Chat, Weighing
        from qaflora_edge.cli.settings import shared_settings

        options = prompt.options.model_dump(exclude_none=True)
        schema: Any = prompt.schema  # llm has turned a class into a schema by now
        settings = shared_settings("llm")
        weighing = {name: options.pop(name) for name in _WEIGHING if name in options}
        keywords = settings.engine | weighing
        strategy = keywords.pop("strategy")  # of this prompt: the Engine stays open for others
        engine = opened(self.folder, keywords)
        ask = Ask(
            Chat([chat_message(message) for message in prompt.messages]),
            Weighing(strategy),
            settings.sampling.updated(options),
            json_schema=schema,
        )
        answer = engine.submit(ask)
        yield from answer
        response.set_usage(input=answer.n_prompt, output=answer.usage["completion_tokens"])
        response.response_json = {
            "base": engine.name,
            "finish_reason": answer.finish_reason,
            "fusion": answer.fusion.to_dict(),
            "timings": answer.timings.to_dict(),
        }


def chat_message(message: Message) -> dict[str, str]:
    """A message of `llm` as a template takes it; reasoning of another model is left out."""
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


_open: "dict[tuple[Any, ...], Engine]" = {}


def opened(folder: Path, keywords: dict[str, Any]) -> "Engine":
    """An Engine for a bundle: the one that is open when it is the same, else a new one."""
    from qaflora_edge.engine import Engine

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
