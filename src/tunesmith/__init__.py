"""tunesmith: fine-tune language models, correctly and fast.

    import tunesmith
    result = tunesmith.train("recipes/sft-lora.yaml", out="runs/a")
    model, tokenizer = tunesmith.load(result["model_dir"])
    print(tunesmith.generate(result["model_dir"], ["What is a generator?"]))

Importing this package loads neither torch nor transformers; each function imports what it needs when it is called.
"""

import os
import sys
import types
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "train": "tunesmith.train.run",
    "check": "tunesmith.train.run",
    "load": "tunesmith.models.load.load",
    "load_adapters": "tunesmith.models.adapters.adapter_set",
    "generate": "tunesmith.models.generate.decode",
    "predict": "tunesmith.evaluate.predict",
    "evaluate": "tunesmith.evaluate.evaluate_model",
    "merge": "tunesmith.merge.merge_adapter",
}

__all__ = ["__version__", *_WHERE]


class _Package(types.ModuleType):
    """``train``, ``evaluate`` and ``merge`` name a function of the API and the folder it lives in:
    the attribute is the function.

    Python would put the folder's module there as soon as anything imports from it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _WHERE or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def _share_the_cores() -> None:
    """Let OpenMP threads sleep soon when they wait. By default they spin for milliseconds, and with any other busy program on the
    machine a training step takes ten times as long. torch reads this when it loads; what the user has set stays.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # oneDNN keeps compiled code for every shape it has seen, 1024 of them by default; packed rows bring new shapes each step
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "200")


_share_the_cores()


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
