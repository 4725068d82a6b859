"""What a base in 4 or 8 bits costs and saves: the loss of the untouched model, bits a parameter, and memory of training steps at size.

python benchmarks/qlora.py loss --data alpaca.json      # smollm2-135m as it is, nf4, fp4, int8: held-out loss and bits
python benchmarks/qlora.py memory                       # LoRA and QLoRA steps of a random llama of 1.1B parameters (12 GB free)

Each writes a JSON file to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tunesmith import machine
from tunesmith.evaluate.evaluate_model import evaluate
from tunesmith.models.find.locate import locate
from tunesmith.models.load import load, quantization

RESULTS = Path(__file__).parent / "results"
KINDS: dict[str, tuple[str, bool] | None] = {
    "bf16": None, "nf4": ("nf4", False), "nf4, double": ("nf4", True), "fp4": ("fp4", False), "fp4, double": ("fp4", True), "int8": ("int8", False),
}  # fmt: skip
TINYLLAMA = dict(
    vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
    max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


def losses(model: str, data: Path, rows: int) -> list[dict[str, Any]]:
    """The untouched model on the last ``rows`` rows of ``data``, kept in each of ``KINDS``, computed with in bf16."""
    folder = locate(model)
    tokenizer = load.load_tokenizer(folder)
    found = []
    with tempfile.TemporaryDirectory() as room:
        held = Path(room) / "rows.json"
        held.write_text(json.dumps(json.loads(data.read_text(encoding="utf-8"))[-rows:]), encoding="utf-8")
        for name, kind in KINDS.items():
            kwargs = quantization.load_kwargs(*kind) if kind else {}
            network = load.load_model(folder, dtype=torch.bfloat16, **kwargs)
            figures, kept = evaluate((network, tokenizer), held), quantization.measure(network)
            one = {"base": name, "eval_loss": figures["eval_loss"], "rows": figures["rows"], "bits_per_parameter": 16.0}
            if kept:
                named = ("bits_per_parameter", "bytes", "parameters", "base_bytes", "base_bytes_before")
                one |= {key: kept[key] for key in named} | {"of_bf16": kept["bits_per_parameter"] / 16}
            found.append(one)
            print(json.dumps(one), flush=True)
    return found


def write_llama(folder: Path) -> None:
    """A random llama of 1.1B parameters in bf16, written layer by layer, so that it is never held whole."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny import tiny_tokenizer

    config = AutoConfig.for_model("llama", **TINYLLAMA)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).state_dict().items()}
    torch.manual_seed(0)
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(name.split(".")[2] if ".layers." in name else name, []).append(name)
    index, total = {}, 0
    for number, names in enumerate(groups.values()):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        made = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16)
            if len(shapes[name]) == 1
            else (torch.randn(shapes[name]) * 0.02).bfloat16()
            for name in names
        }
        save_file(made, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
        total += sum(value.nbytes for value in made.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    config.save_pretrained(folder)
    tiny_tokenizer("chatml").save_pretrained(folder)


def step(folder: Path, kind: str) -> dict[str, Any]:
    """Two steps of two rows of about 100 tokens in bf16, in this process; run each in a fresh one."""
    import tunesmith
    from tunesmith.train import setup

    loading: list[int] = []
    build = setup.build

    def noted(*given: Any) -> Any:
        built = build(*given)
        loading.append(machine.peak_memory_bytes())
        return built

    setup.build = noted
    rows = folder.parent / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"{n}", "completion": " the quick brown fox" * 20}) for n in range(4)))
    before = machine.peak_memory_bytes()
    made = {
        "model": str(folder), "objective": "sft", "adaptation": {"type": kind, "r": 8}, "data": {"train": [{"path": str(rows)}], "eval": {"fraction": 0}},
        "train": {"batch_size": 2, "max_steps": 2, "precision": "bf16", "micro_batch_tokens": 512, "save_steps": None},
        "samples": {"count": 0},
    }  # fmt: skip
    outcome = tunesmith.train(made, out=folder.parent / f"run-{kind}")
    return {
        "adaptation": kind,
        "peak_memory_bytes": outcome["peak_memory_bytes"],
        "peak_after_loading_bytes": loading[0] - before,
        "total_parameters": outcome["total_parameters"],
        "base_bytes": outcome.get("base_bytes"),
        "tokens_per_second": outcome["tokens_per_second"],
    }


def memory(room: Path) -> list[dict[str, Any]]:
    folder = room / "llama-1.1b"
    folder.mkdir()
    write_llama(folder)
    found = []
    for kind in ("lora", "qlora"):
        done = subprocess.run([sys.executable, __file__, "step", str(folder), kind], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(found[-1]), flush=True)
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("loss")
    one.add_argument("--model", default="smollm2-135m")
    one.add_argument("--data", type=Path, required=True)
    one.add_argument("--rows", type=int, default=60)
    verbs.add_parser("memory")
    inner = verbs.add_parser("step")
    inner.add_argument("folder", type=Path)
    inner.add_argument("kind")
    given = parser.parse_args(arguments)
    load.quiet()
    if given.verb == "step":
        print(json.dumps(step(given.folder, given.kind)))
        return
    if given.verb == "loss":
        found = losses(given.model, given.data, given.rows)
    else:
        with tempfile.TemporaryDirectory() as room:
            found = memory(Path(room))
    about = {"machine": machine.describe(), "results": found}
    (RESULTS / f"qlora-{given.verb}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main(sys.argv[1:])
