"""From a model folder to a model in memory, strictly.

A tensor that the folder lacks, or that the model has no parameter for, is an error that names it.
``from_pretrained`` only warns, and a renamed adapter key would leave the untrained model. Nothing here uses
the network, runs code that came with a model, or opens a pickle.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from tunesmith.errors import ModelError
from tunesmith.hub import ask
from tunesmith.json_types import JsonObject
from tunesmith.models.find import config_bounds, headers, record, saved_files
from tunesmith.models.find.locate import Folder, locate
from tunesmith.models.heads import head_types
from tunesmith.models.load import (
    dequantized_linear,
    finite,
    head_loading,
    merge_weights,
    probe,
    quantization,
    vocabulary,
)
from tunesmith.models.load.checkpoint_weights import restore_checkpoint
from tunesmith.models.network import has_attributes, tunesmith_settings

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

_OFFLINE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1",
}  # fmt: skip
_SILENT = {
    "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1",
    "BITSANDBYTES_NOWELCOME": "1",
}  # fmt: skip
_LIBRARIES = r"(transformers|peft|bitsandbytes|accelerate|huggingface_hub|torch)(\.|$)"
_OLD_BUFFERS = (
    ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias",
)  # fmt: skip
"""Constants that old checkpoints hold and today's classes compute."""


def quiet() -> None:
    """Keep this process off the network and library messages off the screen. Call it before loading a model.

    The Hub's client reads these variables when it is imported. bitsandbytes, which peft imports when it is
    installed, asks the Hub for kernels unless it is offline. An imported transformers needs its own switches.
    """
    ask.remember_user()
    os.environ.update(_OFFLINE)
    for name, value in _SILENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=_LIBRARIES)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns that it has no kernels from the Hub
    if "torch" in sys.modules and not sys.modules["torch"].cuda.is_available():
        # transformers imports an installed DeepSpeed, which otherwise prints that it looks for an accelerator
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "torch" in sys.modules:
        quantization.import_bitsandbytes()
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def load(
    model: str | Path, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model in eval mode and its tokenizer, offline.

    ``model``: catalog name, or folder of a model, an adapter (returned as a peft model), a run or a checkpoint.
    ``dtype``: default is the saved one. Logits recorded at saving are compared. Raises ModelError.
    """
    folder = locate(model, checkpoints=True)
    tokenizer = load_tokenizer(folder)
    loaded = load_model(folder, head=None, dtype=dtype)
    probe.verify_probe(folder.path, loaded, tokenizer)
    return restore_checkpoint(loaded, folder), tokenizer


def load_config(folder: Folder) -> PretrainedConfig:
    """Return the transformers config of the network; of an adapter, of its base model."""
    quiet()
    from transformers import AutoConfig

    load_saved = AutoConfig.from_pretrained
    return _call(folder.path, load_saved, folder.network, local_files_only=True, **_trust(folder))


def load_tokenizer(folder: Folder) -> PreTrainedTokenizerBase:
    """Return the tokenizer saved with the model; of an adapter without one, its base model's."""
    quiet()
    from transformers import AutoTokenizer

    own = any((folder.path / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    source = folder.path if own else folder.network
    options = dict(local_files_only=True, **_trust(folder))
    return vocabulary.forget_loading(_call(folder.path, AutoTokenizer.from_pretrained, source, **options))


def empty_model(folder: Folder, config: PretrainedConfig, head: str = "lm") -> PreTrainedModel:
    """Return the network of ``config``, from ``folder``, without weights. Call it on the meta device."""
    head_types.require_class(config, head)
    return head_loading.without_unused_pooler(_build(folder, config, head))


_built: set[tuple[Path, str, str]] = set()
"""The folders, heads and configs whose networks were built, and are no larger than their weights."""


def _build(folder: Folder, config: PretrainedConfig, head: str) -> PreTrainedModel:
    """Return the network of ``config``. Raises ModelError if it is far larger than the weights in the folder."""
    network, stored = head_types.auto_class(head).from_config, config.to_json_string()
    model: PreTrainedModel = _call(folder.path, network, config, **_trust(folder))
    tensors, packed = (
        headers.read_tensors(folder.network).values(),
        has_attributes(config, "quantization_config"),
    )
    config_bounds.check_parameters(model.num_parameters(), tensors, packed, folder.network)
    _built.add((folder.network, head, stored))
    return model


def head_of(folder: Folder) -> str:
    """Return the head of a saved model: lm, score, token or span."""
    if folder.kind == "adapter":
        return str(record.head(folder.path).get("type", "lm"))
    architectures = headers.read_json(folder.path / "config.json").get("architectures") or [""]
    return head_types.kind_of(str(architectures[0]))


def _trust(folder: Folder) -> dict[str, bool]:
    """Return transformers' option to run Python files of the folder, as the recipe chose."""
    return dict(trust_remote_code=folder.remote_code)


def load_model(
    folder: Folder,
    head: str | None = None,
    dtype: torch.dtype | None = None,
    adapter: Literal["attach", "ignore", "merge"] = "attach",
    trainable: bool = False,
    head_config: JsonObject | None = None,
    **load_kwargs: object,
) -> PreTrainedModel:
    """Load the weights, strictly, and return the model in eval mode.

    ``head``: lm, score, token or span; None = the head that was saved. ``head_config``: config entries of a
    new head (``num_labels``, ``id2label``), initialised if the saved head is missing or has other labels.
    ``dtype``: default is the checkpoint's. ``adapter``: "attach" returns a peft model, "ignore" its base
    model, "merge" a plain model with the adapter merged in fp32 and then cast. ``trainable``: parameters
    require gradients (of an attached adapter: only the adapter's). ``load_kwargs`` are passed to
    ``from_pretrained``.

    A base model that was quantised while the adapter was trained is quantised again; an adapter is merged
    into its de-quantised weights. Raises ModelError naming every tensor that is missing, unexpected or of
    another shape, when the base is not the model that the adapter was trained on, when a file has changed
    since it was saved (``saved_files``), and when a weight is not finite.
    """
    quiet()
    wanted = dtype or checkpoint_dtype(folder.network)
    head = head or head_of(folder)
    with saved_files.checking_weights(folder.path, folder.base):
        if folder.kind == "adapter" and adapter != "ignore":
            if head_config is None:
                head_config = record.head(folder.path).get("config")
            load_base = partial(_load_full, folder, head, head_config)
            model = _load_adapted(folder, load_base, wanted, adapter, trainable, load_kwargs)
            finite.check_loaded(model, folder.path)
            return model.eval()
        model = _load_full(folder, head, head_config, wanted, load_kwargs)
    finite.check_loaded(model, folder.path)
    for parameter in model.parameters():
        parameter.requires_grad_(trainable and parameter.is_floating_point())
    return model.eval()


def _load_adapted(
    folder: Folder, load_base: Callable[[torch.dtype, dict[str, object]], PreTrainedModel], dtype: torch.dtype,
    adapter: Literal["attach", "ignore", "merge"], trainable: bool, load_kwargs: dict[str, object],
) -> PreTrainedModel:  # fmt: skip
    import torch

    record.check_base(folder.path, folder.network)
    quantized = quantization.kwargs_from_record(record.read(folder.path).get("quantization"))
    if adapter == "merge":
        model = load_base(torch.float32, load_kwargs)
        if quantized:
            quantization.write_dequantized(model, load_base(torch.float32, load_kwargs | quantized))
    else:
        model = load_base(dtype, quantized | load_kwargs)
    training = trainable and adapter == "attach"
    model = attach_adapter(folder, model, training)
    if not training:
        vocabulary.write_rows(model)
    if adapter == "merge":
        model = merge_weights.merge_into_base(model).to(dtype).requires_grad_(trainable)
    return model


def checkpoint_dtype(path: Path) -> torch.dtype:
    """Return the dtype that the config names, if a weight is stored in it; else the dtype of most parameters.

    transformers prefers the config's dtype too; so a bf16 model with a few fp32 tensors stays bf16.
    """
    import torch

    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    counts: dict[str, int] = {}
    for tensor in headers.read_tensors(path).values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.count
    config = headers.read_json(path / "config.json")
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    stored = {str(known[name]).removeprefix("torch."): known[name] for name in counts if name in known}
    if named in stored:
        return stored[named]
    return known.get(max(counts, key=lambda name: counts[name], default="F32"), torch.float32)


def _load_full(
    folder: Folder, head: str, head_config: JsonObject | None, dtype: torch.dtype, kwargs: dict[str, object]
) -> PreTrainedModel:
    quiet()
    import torch

    path = folder.network
    quantized = "quantization_config" in kwargs
    if quantized:  # from the checkpoint's dtype, so that the result does not depend on the compute dtype
        kwargs = {"dtype": checkpoint_dtype(path), **kwargs}
    options = {"dtype": dtype, **kwargs, **_trust(folder)}
    if (path, head, load_config(folder).to_json_string()) not in _built:
        with torch.device("meta"):  # transformers allocates a tensor of another shape before it refuses it
            _build(folder, load_config(folder), head)
    network, replaced, renamed = head_types.auto_class(head), False, {}
    if head != "lm":
        config = load_config(folder)
        saved = head_loading.head_of_config(config)
        replaced = head_loading.is_other_head(saved, config, head, head_config)
        if head_config is not None:
            head_loading.apply_head_config(config, head_config)
        renamed = head_loading.renamed_body(folder, config, head)
        options |= {"config": config, "ignore_mismatched_sizes": True, "key_mapping": renamed or None}
    model, missing, unexpected, mismatched = _from_pretrained(network, path, folder.path, options)
    if head != "lm":
        names = [name for name, *_ in mismatched]
        missing, unexpected = head_loading.unexplained_keys(model, head, missing, unexpected, names)
    _require_match(path, type(model).__name__, missing, unexpected)
    if replaced:
        head_loading.reset_output_layer(model, head)
    if quantized:
        dequantized_linear.compute_in(model, dtype)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    head_loading.save_under_class_names(model, renamed)
    return head_loading.without_unused_pooler(model)


def stock_class_problem(network: PreTrainedModel, folder: Folder) -> str | None:
    """Return why transformers' class cannot open an adapter of ``network`` on the base ``folder``, or None.

    The class builds the base from the base's config and parameter names, then adds the adapter. transformers
    has no class with mean pooling, so a merged copy would not help there.
    """
    kind = head_loading.head_of_network(network)
    if kind == "lm" or tunesmith_settings(network.config).get("pooling") == "mean":
        return None
    stored = load_config(folder)
    if head_loading.renamed_body(folder, stored, kind):
        name = type(network).__name__
        return (
            f"{name} uses other parameter names for the body than the base has, and initialises it randomly"
        )
    if stored.id2label != network.config.id2label:
        return "it takes the labels from the base, which has others"
    return None


def check_weights(path: Path, network: type[PreTrainedModel], named: Path) -> None:
    """Raise ModelError unless the weights in ``path`` match the class ``network`` by name and shape.

    No weight is read. ``named``: the folder that the message names.
    """
    options = {"device_map": "meta", "ignore_mismatched_sizes": True}
    _, missing, unexpected, mismatched = _from_pretrained(network, path, named, options)
    if mismatched:
        name, found, expected = min(mismatched)
        shapes = f"the shape {tuple(found)}, and the config makes it {tuple(expected)}"
        raise ModelError(f"{named}: {name} has {shapes}")
    _require_match(named, network.__name__, missing, unexpected)


def adapter_config(folder: Path) -> PeftConfig:
    """Return the peft config of an adapter folder. Raises ModelError for a type that peft does not know."""
    from peft import PeftConfig

    from tunesmith.models.adapters import bottleneck_tuner  # imports peft

    bottleneck_tuner.register()
    return _call(folder, PeftConfig.from_pretrained, str(folder), local_files_only=True)


def attach_adapter(
    folder: Folder, model: PreTrainedModel, trainable: bool, name: str = "default"
) -> PreTrainedModel:
    """Return ``model``, plain or a peft model, with the adapter of ``folder`` added, loaded strictly.

    ``name``: peft's name of the adapter.
    """
    from peft import PeftModel, get_peft_model_state_dict

    from tunesmith.models.adapters import restored_names, virtual_tokens  # imports transformers

    tensors = headers.read_tensors(folder.path, "adapter_model")
    stored, config = set(tensors), adapter_config(folder.path)
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    virtual_tokens.check_stored(shapes, config, network, folder.path)
    train = trainable and not config.is_prompt_learning  # peft refuses to load virtual tokens for training
    options = {"adapter_name": name, "is_trainable": train, "local_files_only": True}
    if isinstance(model, PeftModel):
        _call(folder.path, model.load_adapter, str(folder.path), **options)
        adapted = model
    else:
        vocabulary.fit_to_adapter(model, folder.path)
        adapted = _call(folder.path, PeftModel.from_pretrained, model, str(folder.path), **options)
        virtual_tokens.install(adapted, trainable)
    # save_embedding_layers="auto" would ask the Hub for the base's vocabulary (peft#1452)
    expected = set(get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False))
    unexpected = stored - expected - set(adapted.state_dict())  # an embedding is saved under the base's name
    _require_match(folder.path, type(adapted).__name__, expected - stored, unexpected)
    if lost := restored_names.unrestored_layers(adapted, shapes, name):
        raise ModelError(
            f"{folder.path}: peft restores no LoRA on {_first_names(lost)}: it renames their tensors while it loads "
            f"them.\n  Nothing was loaded. Train the adapter again without these layers."
        )
    return adapted


def _from_pretrained(
    network: type[PreTrainedModel], path: Path, named: Path, options: dict[str, object]
) -> tuple[PreTrainedModel, list[str], list[str], list[tuple[str, torch.Size, torch.Size]]]:
    """Return (model, missing, unexpected, mismatched): names of tensors, the last with both shapes."""
    strict = {"output_loading_info": True, "local_files_only": True, "use_safetensors": True}
    with quantization.one_tensor_at_a_time() if "quantization_config" in options else nullcontext():
        model, report = _call(named, network.from_pretrained, path, **options, **strict)
    unexpected = [name for name in report["unexpected_keys"] if not name.endswith(_OLD_BUFFERS)]
    return model, report["missing_keys"], unexpected, report["mismatched_keys"]


def _require_match(path: Path, network: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise ModelError naming the tensors that are ``missing`` or ``unexpected``."""
    differences = {"missing": sorted(missing), "unexpected": sorted(unexpected)}
    lines = [f"\n  {kind}: {_first_names(names)}" for kind, names in differences.items() if names]
    if lines:
        raise ModelError(
            f"the weights in {path} do not match {network}.{''.join(lines)}\n"
            "  Nothing was loaded, since it would be another model. Copy or download the folder again."
        )


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _call(path: Path, loader: Callable[..., T], *arguments: object, **options: object) -> T:
    """Call a library's loader. Raises ModelError naming ``path`` when the loader fails."""
    try:
        return loader(*arguments, **options)
    except Exception as error:
        raise ModelError(f"{path} cannot be loaded: {error or type(error).__name__}") from error
