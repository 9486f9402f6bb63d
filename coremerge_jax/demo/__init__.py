"""A small real example: six adapters of a vision transformer for handwritten digits.

The base model reads plain 8×8 digits. Each adapter was trained to read them under one more
condition (tilted, masked, under stripes, ...), so a merged adapter has to read them under all six,
with one head.

    >>> import coremerge_jax as cm
    >>> from coremerge_jax import demo
    >>> adapters = [cm.load_peft(path) for path in demo.adapters()]
    >>> merged = cm.merge(adapters, cm.tsv())
    >>> demo.evaluate(merged)  # doctest: +SKIP
    {'tilt': 0.8, ...}

`benchmarks/demo_train.py` made all files in ``data``. The images are from the test set of E.
Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
1998, https://doi.org/10.24432/C50P49, licensed under CC BY 4.0, as scikit-learn distributes it;
they are unchanged but for their order.
"""

from coremerge_jax.demo.data import adapters, base, images, questions
from coremerge_jax.demo.evaluation import METHODS, Score, evaluate, merge, run, table
from coremerge_jax.demo.model import fold, forward
from coremerge_jax.demo.tasks import TASKS
from coremerge_jax.demo.unlabelled import WITH_INPUTS, inputs, predict, statistics

__all__ = [
    "METHODS",
    "TASKS",
    "WITH_INPUTS",
    "Score",
    "adapters",
    "base",
    "evaluate",
    "fold",
    "forward",
    "images",
    "inputs",
    "merge",
    "predict",
    "questions",
    "run",
    "statistics",
    "table",
]
