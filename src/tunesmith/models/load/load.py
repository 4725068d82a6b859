"""From a model folder to a model in memory, strictly.

Nothing here reaches the network, runs code that came with a model, or opens a pickle. Loading is strict both ways: a tensor
that the folder lacks, or that the model has no place for, is an error that names it. ``from_pretrained`` only warns, and a
renamed adapter key would otherwise leave the untrained model standing.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.errors import ModelError, UserError
from tunesmith.hub import ask
from tunesmith.models.adapters import adapter_types
from tunesmith.models.find import headers, record
from tunesmith.models.find.locate import Folder, locate
from tunesmith.models.heads import head_types
from tunesmith.models.load import dequantized_linear, head_loading, probe, quantization, vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
_SILENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "BITSANDBYTES_NOWELCOME": "1",
}
_LIBRARIES = r"(transformers|peft|bitsandbytes|accelerate|huggingface_hub|torch)(\.|$)"
_OLD_BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
"""Constants that old checkpoints carry and today's classes compute: they hold nothing that was learnt."""


def quiet() -> None:
    """Keep this process off the network and library chatter off the screen. Entry points call it before they load a model.

    The Hub's client reads these variables when it is imported, and bitsandbytes (which peft imports when it is installed)
    asks the Hub for kernels unless it is offline. Where transformers is already imported, its own switches are used.
    """
    ask.remember_user()
    os.environ.update(_OFFLINE)
    for name, value in _SILENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=_LIBRARIES)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns that it has no kernels from the Hub
    if "torch" in sys.modules and not sys.modules["torch"].cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # transformers imports an installed DeepSpeed, which looks for one aloud
    if "transformers" in sys.modules:
        from transformers.utils import logging as chatter

        chatter.set_verbosity_error()
        chatter.disable_progress_bar()


def load(model: str | Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The model in eval mode and its tokenizer, offline. ``model``: catalog name, model, adapter or run folder.

    ``dtype``: default is the checkpoint's own. An adapter comes back attached to its base, as a peft model. What tunesmith
    saved is compared with the logits written when it was saved. Raises ModelError.
    """
    folder = locate(model)
    tokenizer = load_tokenizer(folder)
    loaded = load_model(folder, head=None, dtype=dtype)
    probe.verify_probe(folder.path, loaded, tokenizer)
    return loaded, tokenizer


def load_config(folder: Folder) -> Any:
    """The transformers config of the network (for an adapter: of its base)."""
    quiet()
    from transformers import AutoConfig

    return _explained(
        folder, lambda: AutoConfig.from_pretrained(folder.network, local_files_only=True, **_code(folder))
    )


def load_tokenizer(folder: Folder) -> Any:
    """The tokenizer saved with the model; an adapter without one uses its base's."""
    quiet()
    from transformers import AutoTokenizer

    own = any((folder.path / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    where = folder.path if own else folder.network
    return _explained(
        folder, lambda: AutoTokenizer.from_pretrained(where, local_files_only=True, **_code(folder))
    )


def empty_model(folder: Folder, config: Any, head: str = "lm") -> Any:
    """The network of ``config`` without weights: the caller is on the meta device. ``folder``: where it comes from."""
    head_types.require_class(config, head)
    return _explained(
        folder, lambda: head_loading.fitted(head_types.auto_class(head).from_config(config, **_code(folder)))
    )


def head_of(folder: Folder) -> str:
    """The head of a saved model: lm, score, token or span."""
    if folder.kind == "adapter":
        return str(record.head(folder.path).get("type", "lm"))
    named = headers.read_json(folder.path / "config.json").get("architectures") or [""]
    return head_types.kind_of(str(named[0]))


def _code(folder: Folder) -> dict[str, bool]:
    """Whether transformers may run Python files of the folder: the one place where a recipe's ``trust_remote_code`` arrives."""
    return dict(trust_remote_code=folder.remote_code)


def load_model(
    folder: Folder,
    head: str | None = None,
    dtype: torch.dtype | None = None,
    adapter: Literal["attach", "ignore", "merge"] = "attach",
    trainable: bool = False,
    head_config: Mapping[str, Any] | None = None,
    **load_kwargs: Any,
) -> Any:
    """Load the weights, strictly, and return the model in eval mode.

    ``head``: lm, score, token or span; None = what the folder holds. ``head_config``: entries of the config that say what a new
    head is (``num_labels``, ``id2label``); a head that the folder lacks, or has for other labels, is drawn anew.
    ``dtype``: default is the checkpoint's own. ``adapter`` says what becomes of an adapter: "attach" returns a peft model,
    "ignore" its base alone, "merge" a plain model with the adapter folded in (in fp32, then cast). ``trainable``: whether
    parameters require gradients (of an attached adapter: the adapter's only). ``load_kwargs`` go to ``from_pretrained``. A base
    that was quantised is quantised again as it was, from the checkpoint's own numbers; merged, it is what its bits stand for.
    Raises ModelError naming every tensor that is missing, unexpected or of another shape, and when an adapter's base is
    not the model it was trained on.
    """
    quiet()
    import torch

    attach = folder.kind == "adapter" and adapter != "ignore"
    if attach:
        record.check_base(folder.path, folder.network)
    wanted = dtype or checkpoint_dtype(folder.network)
    head = head or head_of(folder)
    if attach and head_config is None:
        head_config = record.head(folder.path).get("config")
    kept = record.read(folder.path).get("quantization") if attach else None
    if kept and adapter == "attach":
        load_kwargs = {**quantization.of_record(kept), **load_kwargs}
    model = _full(
        folder, head, torch.float32 if attach and adapter == "merge" else wanted, load_kwargs, head_config
    )
    if kept and adapter == "merge":
        bits = {**load_kwargs, **quantization.of_record(kept)}
        quantization.write_values(model, _full(folder, head, torch.float32, bits, head_config))
    if attach:
        training = trainable and adapter == "attach"
        model = attached(folder, model, training)
        if not training:
            vocabulary.write_rows(model)
    else:
        for parameter in model.parameters():
            parameter.requires_grad_(trainable and parameter.is_floating_point())
    if attach and adapter == "merge":
        model = merged(model).to(wanted).requires_grad_(trainable)
    return model.eval()


def checkpoint_dtype(path: Path) -> torch.dtype:
    """The dtype that the config names, where any weight is stored in it; else the one that holds most numbers.

    The first is what transformers takes too, and what keeps the few tensors that were trained in fp32 on a bf16 body as they are.
    """
    import torch

    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    counts: dict[str, int] = {}
    for tensor in headers.read_tensors(path).values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.count
    config = headers.read_json(path / "config.json")
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), None)
    if isinstance(named, torch.dtype) and named in [known.get(name) for name in counts]:
        return named
    return known.get(max(counts, key=lambda name: counts[name], default="F32"), torch.float32)


def merged(model: PreTrainedModel) -> Any:
    """Fold a peft model's adapter into its base, in place, and return the plain model. Raises UserError where that is impossible.

    Tied embeddings: a delta on one of the two tied weights must not reach the other. They are separated before the merge and
    tied again if they come out equal; else the config says that they are no longer tied, so that a reload keeps both.
    """
    import torch

    if quantization.record(model) is not None:
        raise UserError(
            'an adapter cannot be folded into 4 or 8 bits: load it with adapter="merge", onto what the bits stand for'
        )
    for config in model.peft_config.values():
        check_mergeable(config)
    core = model.get_base_model()
    first, last = (_unwrapped(end) for end in (core.get_input_embeddings(), core.get_output_embeddings()))
    tied = last is not None and first.weight is last.weight
    if tied:
        last.weight = torch.nn.Parameter(first.weight.detach().clone())
    _take_whole_parts(model)
    try:
        plain = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"this adapter cannot be merged: {error}") from None
    if tied:
        first, last = plain.get_input_embeddings(), plain.get_output_embeddings()
        same = torch.equal(first.weight, last.weight)
        if same:
            last.weight = first.weight
        for part in (
            plain.config,
            plain.config.get_text_config(),
        ):  # peft has written what it saw before they were compared
            part.tie_word_embeddings = same
    return plain


def _take_whole_parts(model: PreTrainedModel) -> None:
    """Put parts that were trained whole in their places, where they are made of several layers: peft takes each for one layer."""
    core = model.get_base_model()
    for name, module in list(core.named_modules()):
        trained = getattr(module, "modules_to_save", None)
        if trained is not None and not hasattr(module.original_module, "weight"):
            parent, _, last = name.rpartition(".")
            setattr(core.get_submodule(parent), last, trained[module.active_adapters[0]])


def check_mergeable(config: Any) -> None:
    """Raise UserError for an adapter that no weight can stand for. ``config``: its peft config."""
    name = config.peft_type.value.lower()
    if config.is_prompt_learning:
        raise UserError(f"a {name} adapter adds inputs, not weights: there is nothing to merge it into")
    if (why := adapter_types.kind_of(config.peft_type.value).unmergeable) is not None:
        raise UserError(f"a {name} adapter is {why}")


def _unwrapped(layer: Any) -> Any:
    """The layer of the base that peft has put an adapter around, or a trained copy beside."""
    for inner in ("base_layer", "original_module"):
        layer = getattr(layer, inner, layer)
    return layer


def _full(
    folder: Folder,
    head: str,
    dtype: torch.dtype,
    load_kwargs: dict[str, Any],
    head_config: Mapping[str, Any] | None = None,
) -> Any:
    quiet()
    path = folder.network
    own = (
        checkpoint_dtype(path) if "quantization_config" in load_kwargs else dtype
    )  # the bits must not depend on what computes
    options = {
        "dtype": own,
        **load_kwargs,
        **_code(folder),
        "local_files_only": True,
        "use_safetensors": True,
    }
    network, anew = head_types.auto_class(head), False
    if head != "lm":
        config = load_config(folder)
        anew = head_loading.is_other(
            head_types.kind_of((config.architectures or [""])[0]), config, head, head_config
        )
        options |= head_loading.options(folder, config, head, head_config)
    model, report = _explained(
        folder, lambda: network.from_pretrained(path, output_loading_info=True, **options)
    )
    unexpected = [name for name in report["unexpected_keys"] if not name.endswith(_OLD_BUFFERS)]
    missing = report["missing_keys"]
    if head != "lm":
        missing, unexpected = head_loading.settle(model, head, report, missing, unexpected)
    _strict(path, type(model).__name__, missing, unexpected)
    if anew:
        head_loading.draw(model, head)
    if "quantization_config" in load_kwargs:
        dequantized_linear.compute_in(model, dtype)
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    head_loading.keep_own_names(model, options)
    return head_loading.fitted(model)


def stock_refuses(network: PreTrainedModel, folder: Folder) -> str | None:
    """Why transformers' own class cannot open an adapter of this ``network`` on the base in ``folder``, or None when it can.

    It loads the base by the base's config and names, and only then the adapter. A mean over all tokens is no class of its own:
    no copy helps there.
    """
    kind = head_types.kind_of(type(network).__name__)
    if kind == "lm" or (getattr(network.config, "tunesmith", None) or {}).get("pooling") == "mean":
        return None
    stored = load_config(folder)
    if head_loading.renamed_body(folder, stored, kind):
        return f"{type(network).__name__} has the body under another name than the base, and fills it with random numbers"
    if stored.id2label != network.config.id2label:
        return "it takes the labels from the base, which has others"
    return None


def check_weights(path: Path, network: PreTrainedModel, named: Path) -> None:
    """Raise ModelError unless the weights in ``path`` are those of the class ``network``, by name and shape; none is read.

    ``named``: the folder that the message names.
    """
    options = {
        "device_map": "meta",
        "ignore_mismatched_sizes": True,
        "local_files_only": True,
        "use_safetensors": True,
    }
    _, report = _explained(
        Folder(named, "full"), lambda: network.from_pretrained(path, output_loading_info=True, **options)
    )
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise ModelError(
            f"{named}: {name} has the shape {tuple(found)}, and the config makes it {tuple(expected)}"
        )
    unexpected = [name for name in report["unexpected_keys"] if not name.endswith(_OLD_BUFFERS)]
    _strict(named, network.__name__, report["missing_keys"], unexpected)


def is_causal(network: PreTrainedModel) -> bool:
    """Whether a class of transformers is one that ``load_model`` opens as a language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return network.__name__ in {"AutoModelForCausalLM", *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}


def adapter_config(folder: Path) -> Any:
    """The peft config saved in an adapter folder. Raises ModelError for a kind that peft does not know."""
    from peft import PeftConfig

    from tunesmith.models.adapters import bottleneck_tuner  # imports peft

    bottleneck_tuner.register()
    return _explained(
        Folder(folder, "adapter"), lambda: PeftConfig.from_pretrained(str(folder), local_files_only=True)
    )


def attached(folder: Folder, model: PreTrainedModel, trainable: bool, name: str = "default") -> Any:
    """``model`` with the adapter of ``folder`` on it, strictly; beside those it has, if it is a peft model. ``name``: how peft
    calls it.
    """
    from peft import PeftModel, get_peft_model_state_dict

    from tunesmith.models.adapters import virtual_tokens  # imports transformers

    tensors = headers.read_tensors(folder.path, "adapter_model")
    stored, config = set(tensors), adapter_config(folder.path)  # which makes our own kinds known to peft
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    virtual_tokens.check_stored(
        {name: tensor.shape for name, tensor in tensors.items()}, config, network, folder.path
    )
    asked = trainable and not config.is_prompt_learning  # peft refuses to load virtual tokens to be trained
    options = {"adapter_name": name, "is_trainable": asked, "local_files_only": True}
    if isinstance(model, PeftModel):
        _explained(folder, lambda: model.load_adapter(str(folder.path), **options))
        beside = model
    else:
        vocabulary.fit_to_adapter(model, folder.path)
        beside = _explained(folder, lambda: PeftModel.from_pretrained(model, str(folder.path), **options))
        virtual_tokens.install(beside, trainable)
    # save_embedding_layers="auto" would ask the Hub for the base's vocabulary (peft#1452)
    expected = set(get_peft_model_state_dict(beside, adapter_name=name, save_embedding_layers=False))
    whole_layers = set(
        beside.state_dict()
    )  # an embedding saved beside the adapter carries the base's own name
    _strict(folder.path, type(beside).__name__, expected - stored, stored - expected - whole_layers)
    return beside


def _strict(path: Path, network: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    missing = list(missing)
    parts = [
        f"{kind}: {_some(sorted(names))}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if parts:
        raise ModelError(
            f"the weights in {path} are not those of {network}.\n  " + "\n  ".join(parts) + "\n"
            f"  Nothing was loaded: with{' tensors missing' if missing else 'out these'} the model would be another one. "
            "Copy or download the folder again."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _explained(folder: Folder, action: Any) -> Any:
    """Run a library's loader; its refusal becomes a ModelError that names the folder."""
    from safetensors import SafetensorError

    try:
        return action()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder.path} cannot be loaded: {error}") from error
