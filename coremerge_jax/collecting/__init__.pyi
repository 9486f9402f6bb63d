from .collection import Collector, collect, collector
from .torch_models import agreement_torch, collect_torch

__all__ = ["Collector", "agreement_torch", "collect", "collect_torch", "collector"]
