"""``show`` describes a model folder from headers and JSON alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.models.adapters import base_and_adapter
from tests.tiny import save_tiny, tiny_model
from tunesmith.models.find import headers
from tunesmith.models.find.folder_summary import show


def test_a_full_model(tmp_path: Path) -> None:
    facts = show(save_tiny("llama", tmp_path))
    assert facts["path"] == str(tmp_path.resolve()) and facts["kind"] == "full"
    assert (facts["architecture"], facts["head"], facts["tied_embeddings"], facts["context_window"]) == (
        "LlamaForCausalLM",
        "lm",
        True,
        512,
    )
    assert facts["total_parameters"] == tiny_model("llama").num_parameters()
    assert facts["parameters"]["embedding"] == {"count": 512 * 32, "dtypes": ["F32"]}
    assert facts["chat_template"]["present"] and "<|im_end|>" in facts["chat_template"]["stop_tokens"]
    assert facts["adapter"] is None and facts["run"] is None


def test_every_tensor_of_a_tiny_model_has_a_kind(tmp_path: Path) -> None:
    for name in ("llama", "gpt2", "qwen3", "gemma", "gemma3"):
        parameters = show(save_tiny(name, tmp_path / name))["parameters"]
        assert "other" not in parameters and {"attention", "embedding", "mlp", "norm"} <= set(parameters)


def test_an_untied_head_is_counted(tmp_path: Path) -> None:
    facts = show(save_tiny("llama", tmp_path, tie_word_embeddings=False))
    assert facts["parameters"]["head"]["count"] == 512 * 32 and facts["tied_embeddings"] is False


def test_an_adapter_and_its_run(tmp_path: Path) -> None:
    base, adapter = base_and_adapter(tmp_path / "run")
    adapter.rename(tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.yaml").write_text("model: x\n")
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"steps": 3}))
    facts = show(tmp_path / "run")
    assert facts["base"] == str(base.resolve()) and facts["kind"] == "adapter"
    assert facts["adapter"]["type"] == "lora" and facts["adapter"]["r"] == 4 and "q_proj" in facts["adapter"]["target_modules"]
    assert facts["parameters"]["adapter"]["count"] > 0
    assert facts["run"] == {"path": str((tmp_path / "run").resolve()), "manifest": {"steps": 3}}
    assert set(facts["saved_with"]) == {"tunesmith", "torch", "transformers", "peft"}


def test_no_weight_is_read_and_torch_is_not_imported(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    end = min(tensor.start for tensor in headers.read_header(path).values())
    size = path.stat().st_size
    head = path.read_bytes()[:end]
    with path.open("wb") as file:  # the header, then a hole where the weights were
        file.write(head)
        file.truncate(size)
    code = (
        "import sys; from tunesmith.models.find.folder_summary import show; show(sys.argv[1]); assert 'torch' not in sys.modules; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
