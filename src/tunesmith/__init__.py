"""tunesmith: fine-tune language models, correctly and fast.

    import tunesmith
    result = tunesmith.train("recipes/sft-lora.yaml", out="runs/a")
    model, tokenizer = tunesmith.load(result["model_dir"])
    print(tunesmith.generate(result["model_dir"], ["What is a generator?"]))

Importing this package loads neither torch nor transformers; each function imports what it needs when it is
called.
"""

import os
import sys
import types

__version__ = "0.1.0"

_MODULES = {  # function of the public API -> the module that defines it
    "train": "tunesmith.train.run",
    "check": "tunesmith.train.run",
    "load": "tunesmith.models.load.load",
    "load_adapters": "tunesmith.models.adapters.adapter_set",
    "generate": "tunesmith.models.generate.decode",
    "predict": "tunesmith.evaluate.predict",
    "evaluate": "tunesmith.evaluate.evaluate_model",
    "merge": "tunesmith.merge.merge_adapter",
    "verify": "tunesmith.train.integrity",
}

__all__ = ["__version__", *_MODULES]


class _Package(types.ModuleType):
    """Keep ``tunesmith.train``, ``tunesmith.evaluate`` and ``tunesmith.merge`` functions.

    Importing a module of a package with one of these names would otherwise set the attribute to the package.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _MODULES or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

# By default an OpenMP thread that waits spins for milliseconds: next to another busy program, a training step
# takes ten times as long. torch reads this when it is imported; a value that the user has set is kept.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# oneDNN caches compiled code for 1024 shapes by default, and packed rows have a new shape in each step.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "200")


def __getattr__(name: str) -> types.FunctionType:
    if name not in _MODULES:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    import importlib

    return vars(importlib.import_module(_MODULES[name]))[name]
