"""qaflora-edge: several LoRA adapters at once, weighed per query and layer, on a quantised base.

Importing this package loads no native library; the first Engine does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qaflora_edge.engine import Engine
    from qaflora_edge.errors import QafloraError
    from qaflora_edge.evaluation.metrics import Metric, register_metric
    from qaflora_edge.inference.generation import Generation
    from qaflora_edge.openai.llama import Llama, replace_llama_cpp
    from qaflora_edge.weighing.numbers import FusionWeights
    from qaflora_edge.weighing.strategy import (
        Measured,
        Mix,
        Probe,
        Query,
        Strategy,
        register_strategy,
    )

__version__ = "0.1.0"
__all__ = [
    "Engine",
    "FusionWeights",
    "Generation",
    "Llama",
    "Measured",
    "Metric",
    "Mix",
    "Probe",
    "QafloraError",
    "Query",
    "Strategy",
    "__version__",
    "register_metric",
    "register_strategy",
    "replace_llama_cpp",
]

_HOME = {
    "Engine": "qaflora_edge.engine",
    "FusionWeights": "qaflora_edge.weighing.numbers",
    "Generation": "qaflora_edge.inference.generation",
    "Llama": "qaflora_edge.openai.llama",
    "Measured": "qaflora_edge.weighing.strategy",
    "Metric": "qaflora_edge.evaluation.metrics",
    "Mix": "qaflora_edge.weighing.strategy",
    "Probe": "qaflora_edge.weighing.strategy",
    "QafloraError": "qaflora_edge.errors",
    "Query": "qaflora_edge.weighing.strategy",
    "Strategy": "qaflora_edge.weighing.strategy",
    "register_metric": "qaflora_edge.evaluation.metrics",
    "register_strategy": "qaflora_edge.weighing.strategy",
    "replace_llama_cpp": "qaflora_edge.openai.llama",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
