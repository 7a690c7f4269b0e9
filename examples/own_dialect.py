"""qaflora's command line with a server that speaks text-generation-inference's API too:

python examples/own_dialect.py serve demo
"""

from dataclasses import replace

from msgspec import Struct
from msgspec.structs import asdict

from qaflora_edge import Dialect, StreamedBody, register_dialect
from qaflora_edge.cli import main


class Parameters(Struct, frozen=True, rename={"max_tokens": "max_new_tokens"}):
    max_tokens: int = 20
    temperature: float = 0.0


class GenerateBody(StreamedBody, frozen=True, kw_only=True):
    inputs: str
    parameters: Parameters = Parameters()


def asks(body, defaults):
    sampling = defaults.sampling.updated(asdict(body.parameters))
    return [replace(defaults, prompt=body.inputs, sampling=sampling)]


def whole(reply, answers):
    return [{"generated_text": next(answers).text()}]


def pieces(reply, answers):
    for piece in next(answers):
        yield {"token": {"id": 0, "logprob": 0.0, "text": piece, "special": False}}


register_dialect(Dialect("/generate", "Go on with a text.", GenerateBody, asks, whole, pieces))
main()
