"""Quantised experts: formats, the container that stands in for dense weights, readers of published checkpoints."""

import importlib as _importlib
import pkgutil as _pkgutil

from .checkpoint import Checkpoint
from .quantized_experts import QuantizedExperts
from .readers import ExpertReader, LayerExperts

# A format is a subclass of `layout.Format` in a module of this package: importing the modules makes them known.
for _module in _pkgutil.iter_modules(__path__):
    _importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Checkpoint", "ExpertReader", "LayerExperts", "QuantizedExperts"]
