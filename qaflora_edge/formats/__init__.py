"""Files and texts that may come from anywhere, read with every field checked and sizes bounded."""

import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec
from typing import Any


def defer(package: str, after: Callable[[], object] = lambda: None) -> None:
    """Run a package, then `after`, when a name of it is first asked for, unless it ran before."""
    spec = None if package in sys.modules else find_spec(package)
    if spec is None or spec.loader is None:
        return
    loader = spec.loader
    module = module_from_spec(spec)

    def run(name: str) -> Any:
        del module.__getattr__
        loader.exec_module(module)
        after()
        return getattr(module, name)

    module.__getattr__ = run  # type: ignore[method-assign]
    sys.modules[package] = module


defer("gguf")  # its writers and vocabularies take 25 ms
