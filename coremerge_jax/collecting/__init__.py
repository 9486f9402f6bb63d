"""Statistics of modules' inputs, collected while a model reads unlabelled examples."""

from coremerge_jax.collecting.collection import Collector, collect, collector

__all__ = ["Collector", "collect", "collector"]
