"""From what a user calls a model to a model in memory: names and folders, checks, and strict loading.

Nothing here reaches the network, runs code that came with a model, or opens a pickle. Loading is strict both ways: a tensor
that the folder lacks, or that the model has no place for, is an error that names it. ``from_pretrained`` only warns, and a
renamed adapter key would otherwise leave the untrained model standing.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.errors import ModelError, UserError
from tunesmith.models import catalog, headers, probe, store

if TYPE_CHECKING:
    import torch

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
_SILENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "BITSANDBYTES_NOWELCOME": "1",
}
_LIBRARIES = r"(transformers|peft|bitsandbytes|accelerate|huggingface_hub|torch)(\.|$)"
_OLD_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""Constants that old checkpoints carry and today's classes compute: they hold nothing that was learnt."""
_users_offline: list[bool] = []


@dataclass(frozen=True, slots=True)
class Folder:
    """A model on disk. ``base`` is the full model under an adapter; ``run`` the run folder that it came from."""

    path: Path
    kind: Literal["full", "adapter"]
    base: Path | None = None
    run: Path | None = None


def quiet() -> None:
    """Keep this process off the network and library chatter off the screen. Entry points call it before they load a model.

    The Hub's client reads these variables when it is imported, and bitsandbytes (which peft imports when it is installed)
    asks the Hub for kernels unless it is offline. Where transformers is already imported, its own switches are used.
    """
    if not _users_offline:
        _users_offline.append(offline_by_user())
    os.environ.update(_OFFLINE)
    for name, value in _SILENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", module=_LIBRARIES)
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def offline_by_user() -> bool:
    """Whether the user's own environment forbids the Hub (``quiet`` sets the same variable for another reason)."""
    return _users_offline[0] if _users_offline else os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def locate(model: str | Path) -> Folder:
    """Find and check a model without reading a weight: catalog name, model folder, adapter folder or run folder.

    Raises ModelError: an unknown name (the nearest is named), a model not pulled, a folder without weights or with pickles
    only, broken JSON or safetensors headers, a model that asks to run its own code.
    """
    name = str(model)
    stored = store.folder_of(name)
    if name in catalog.CATALOG or ("/" in name and not Path(name).exists() and stored.is_dir()):
        if not stored.is_dir():
            raise ModelError(f"the model {name!r} is not on this machine yet.\n  Type: tunesmith models pull {name}")
        if found := store.problems(stored):
            raise ModelError(
                f"the model {name!r} in {stored} is damaged: {'; '.join(found)}.\n  Type: tunesmith models pull {name}"
            )
        return _inspect(stored, None)
    path = Path(model).expanduser()
    if not path.exists():
        raise ModelError(f"no model called {name!r}, and no folder of that name. {catalog.nearest(name)}")
    if not path.is_dir():
        raise ModelError(f"{path} is a file; expected a folder with config.json and safetensors weights, or a run folder")
    path = path.resolve()
    if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        if (path / "model").is_dir():
            return _inspect(path / "model", path)
        if (path / "recipe.yaml").is_file():
            raise ModelError(f"the run {path} has saved no model yet. Let it finish, or resume it with --resume.")
    return _inspect(path, _run_of(path))


def load(model: str | Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The model in eval mode and its tokenizer, offline. ``model``: catalog name, model, adapter or run folder.

    ``dtype``: default is the checkpoint's own. An adapter comes back attached to its base, as a peft model. What tunesmith
    saved is compared with the logits written when it was saved. Raises ModelError.
    """
    folder = locate(model)
    tokenizer = load_tokenizer(folder)
    loaded = load_model(folder, dtype=dtype)
    probe.verify_probe(folder.path, loaded, tokenizer)
    return loaded, tokenizer


def load_config(folder: Folder) -> Any:
    """The transformers config of the network (for an adapter: of its base)."""
    quiet()
    from transformers import AutoConfig

    return _explained(
        folder, lambda: AutoConfig.from_pretrained(_network(folder), local_files_only=True, trust_remote_code=False)
    )


def load_tokenizer(folder: Folder) -> Any:
    """The tokenizer saved with the model; an adapter without one uses its base's."""
    quiet()
    from transformers import AutoTokenizer

    own = any((folder.path / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    where = folder.path if own else _network(folder)
    return _explained(folder, lambda: AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False))


def load_model(
    folder: Folder,
    head: str = "lm",
    dtype: torch.dtype | None = None,
    adapter: Literal["attach", "ignore", "merge"] = "attach",
    trainable: bool = False,
    **load_kwargs: Any,
) -> Any:
    """Load the weights, strictly, and return the model in eval mode.

    ``dtype``: default is the checkpoint's own. ``adapter`` says what becomes of an adapter: "attach" returns a peft model,
    "ignore" its base alone, "merge" a plain model with the adapter folded in (in fp32, then cast). ``trainable``: whether
    parameters require gradients (of an attached adapter: the adapter's only). ``load_kwargs`` go to ``from_pretrained``.
    Raises ModelError naming every tensor that is missing, unexpected or of another shape, and when an adapter's base is
    not the model it was trained on.
    """
    quiet()
    import torch

    attach = folder.kind == "adapter" and adapter != "ignore"
    if attach:
        probe.check_base(folder.path, _network(folder))
    wanted = dtype or checkpoint_dtype(_network(folder))
    model = _full(folder, head, torch.float32 if attach and adapter == "merge" else wanted, load_kwargs)
    if attach:
        model = _attached(folder, model, trainable and adapter == "attach")
    else:
        model.requires_grad_(trainable)
    if attach and adapter == "merge":
        model = merged(model).to(wanted).requires_grad_(trainable)
    return model.eval()


def checkpoint_dtype(path: Path) -> torch.dtype:
    """The dtype that holds most numbers of a full model's weights, read from the headers."""
    import torch

    known = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
    counts: dict[str, int] = {}
    for tensor in headers.read_tensors(path).values():
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.count
    return known.get(max(counts, key=lambda name: counts[name], default="F32"), torch.float32)


def merged(model: Any) -> Any:
    """Fold a peft model's adapter into its base, in place, and return the plain model. Raises UserError where that is impossible.

    Tied embeddings: a delta on one of the two tied weights must not reach the other. They are separated before the merge and
    tied again if they come out equal; else the config says that they are no longer tied, so that a reload keeps both.
    """
    import torch

    for config in model.peft_config.values():
        if config.is_prompt_learning:
            raise UserError(
                f"a {config.peft_type.value.lower()} adapter adds inputs, not weights: there is nothing to merge it into"
            )
    core = model.get_base_model()
    first, last = (_unwrapped(end) for end in (core.get_input_embeddings(), core.get_output_embeddings()))
    tied = last is not None and first.weight is last.weight
    if tied:
        last.weight = torch.nn.Parameter(first.weight.detach().clone())
    try:
        plain = model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"this adapter cannot be merged: {error}") from None
    if tied:
        first, last = plain.get_input_embeddings(), plain.get_output_embeddings()
        same = torch.equal(first.weight, last.weight)
        if same:
            last.weight = first.weight
        for part in (plain.config, plain.config.get_text_config()):  # peft has written what it saw before they were compared
            part.tie_word_embeddings = same
    return plain


def _unwrapped(layer: Any) -> Any:
    """The layer of the base that peft has put an adapter around, or a trained copy beside."""
    for inner in ("base_layer", "original_module"):
        layer = getattr(layer, inner, layer)
    return layer


def _inspect(path: Path, run: Path | None) -> Folder:
    path = path.resolve()
    if (path / "adapter_config.json").is_file():
        config = headers.read_json(path / "adapter_config.json")
        _refuse_code(config, path / "adapter_config.json")
        _weights(path, "adapter_model")
        return Folder(path, "adapter", _base_of(path, config), run)
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path} has no config.json: expected a model folder in the transformers format, an adapter or a run folder"
        )
    _check_full(path)
    return Folder(path, "full", None, run)


def _check_full(path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (path / name).is_file():
            _refuse_code(headers.read_json(path / name), path / name)
    _weights(path, "model")


def _weights(path: Path, stem: str) -> None:
    """Check the headers of every weight file; say why when there is none that may be opened."""
    files = headers.weight_files(path, stem)
    for file in files:
        headers.read_header(file)
    if files:
        return
    if refused := headers.pickles(path):
        raise ModelError(
            f"{path} holds its weights as {', '.join(file.name for file in refused)}. Opening a pickle runs code that "
            "came with it, so tunesmith does not.\n  Get the model as safetensors, or convert it where you trust it."
        )
    raise ModelError(f"{path} has no weights: expected {stem}.safetensors, or {stem}.safetensors.index.json with its shards")


def _refuse_code(config: Any, file: Path, where: str = "") -> None:
    """Refuse settings that make a library import code from the folder or fetch a kernel, however deep they are nested."""
    if isinstance(config, list):
        for item in config:
            _refuse_code(item, file, where)
        return
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key == "auto_map" and value:
            raise ModelError(
                f"{file}: `{where}{key}` asks to run code that came with the model; tunesmith runs none. Use another model."
            )
        kernel = "attn_implementation" in key or "experts_implementation" in key
        if kernel and any("/" in str(id) for id in (value.values() if isinstance(value, dict) else [value])):
            raise ModelError(
                f"{file}: `{where}{key}` names a kernel to fetch from the Hub, {value!r}. Remove the key from the file."
            )
        _refuse_code(value, file, f"{where}{key}.")


def _base_of(adapter: Path, config: dict[str, Any]) -> Path:
    """The full model under an adapter: the path in its config, else the name that tunesmith or the Hub has for it."""
    recorded = probe.read(adapter).get("base") or {}
    named = config.get("base_model_name_or_path") or ""
    relative = [str(adapter / place) for place in (recorded.get("relative"), named) if place]
    for place in (named, recorded.get("path"), *relative):
        if place and (Path(place) / "config.json").is_file():
            _check_full(Path(place).resolve())
            return Path(place).resolve()
    for name in (recorded.get("name"), catalog.name_of_repo(named), named):
        if name and store.folder_of(name).is_dir():
            _check_full(store.folder_of(name))
            return store.folder_of(name).resolve()
    known = recorded.get("name") or catalog.name_of_repo(named)
    advice = (
        f"Type: tunesmith models pull {known}"
        if known
        else "Put it there, or change base_model_name_or_path in adapter_config.json."
    )
    raise ModelError(
        f"{adapter} is an adapter of {known or named or 'an unnamed model'!r}, which is not on this machine.\n  {advice}"
    )


def _run_of(path: Path) -> Path | None:
    return path.parent if path.name == "model" and (path.parent / "recipe.yaml").is_file() else None


def _network(folder: Folder) -> Path:
    return folder.base or folder.path


def _full(folder: Folder, head: str, dtype: torch.dtype, load_kwargs: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    quiet()
    classes = {"lm": AutoModelForCausalLM}
    if head not in classes:
        raise ModelError(f"no model class for the head {head!r}: expected one of {', '.join(classes)}")
    path = _network(folder)
    options = {"dtype": dtype, **load_kwargs, "local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    model, report = _explained(folder, lambda: classes[head].from_pretrained(path, output_loading_info=True, **options))
    unexpected = [name for name in report["unexpected_keys"] if not name.endswith(_OLD_BUFFERS)]
    _strict(path, type(model).__name__, report["missing_keys"], unexpected)
    return model


def _attached(folder: Folder, model: Any, trainable: bool) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    stored = set(headers.read_tensors(folder.path, "adapter_model"))
    attached = _explained(
        folder, lambda: PeftModel.from_pretrained(model, str(folder.path), is_trainable=trainable, local_files_only=True)
    )
    # save_embedding_layers="auto" would ask the Hub for the base's vocabulary (peft#1452)
    expected = set(get_peft_model_state_dict(attached, save_embedding_layers=False))
    whole_layers = set(attached.state_dict())  # an embedding saved beside the adapter carries the base's own name
    _strict(folder.path, type(attached).__name__, expected - stored, stored - expected - whole_layers)
    return attached


def _strict(path: Path, network: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    parts = [f"{kind}: {_some(sorted(names))}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names]
    if parts:
        raise ModelError(
            f"the weights in {path} are not those of {network}.\n  " + "\n  ".join(parts) + "\n"
            "  Nothing was loaded: with tensors missing the model would be another one. Copy or download the folder again."
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
