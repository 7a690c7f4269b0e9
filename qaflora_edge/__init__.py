"""qaflora-edge: several LoRA adapters at once, weighed per query and layer, on a quantised base.

Importing this package loads no native library; the first Engine does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qaflora_edge.answering.generation import Generation as Generation
    from qaflora_edge.dialects.dialect import Dialect as Dialect
    from qaflora_edge.dialects.dialect import register_dialect as register_dialect
    from qaflora_edge.dialects.options import StreamedBody as StreamedBody
    from qaflora_edge.engine import Engine as Engine
    from qaflora_edge.errors import QafloraError as QafloraError
    from qaflora_edge.evaluation.metrics import Metric as Metric
    from qaflora_edge.evaluation.metrics import register_metric as register_metric
    from qaflora_edge.weighing.plan import DraftStep as DraftStep
    from qaflora_edge.weighing.plan import FusionWeights as FusionWeights
    from qaflora_edge.weighing.plan import Plan as Plan
    from qaflora_edge.weighing.plan import WriteStep as WriteStep
    from qaflora_edge.weighing.strategy import Measured as Measured
    from qaflora_edge.weighing.strategy import Query as Query
    from qaflora_edge.weighing.strategy import Reading as Reading
    from qaflora_edge.weighing.strategy import Strategy as Strategy
    from qaflora_edge.weighing.strategy import register_strategy as register_strategy

__version__ = "0.1.0"
_HOMES = {
    "answering.generation": "Generation",
    "dialects.dialect": "Dialect register_dialect",
    "dialects.options": "StreamedBody",
    "engine": "Engine",
    "errors": "QafloraError",
    "evaluation.metrics": "Metric register_metric",
    "weighing.plan": "DraftStep FusionWeights Plan WriteStep",
    "weighing.strategy": "Measured Query Reading Strategy register_strategy",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
