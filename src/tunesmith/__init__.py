"""tunesmith: fine-tune language models, correctly and fast.

    import tunesmith
    result = tunesmith.train("recipes/sft-lora.yaml", out="runs/a")
    model, tokenizer = tunesmith.load(result["model_dir"])
    print(tunesmith.generate(result["model_dir"], ["What is a generator?"]))

Importing this package loads neither torch nor transformers; each function imports what it needs when it is called.
"""

from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "train": "tunesmith.engine.run",
    "check": "tunesmith.engine.run",
    "load": "tunesmith.models.load",
    "generate": "tunesmith.models.generate",
    "evaluate": "tunesmith.evaluate.run",
    "merge": "tunesmith.merge.run",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
