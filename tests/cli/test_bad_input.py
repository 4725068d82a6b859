"""Bad input: exit code 2, one clear message, nothing started, nothing overwritten."""

import json

import pytest
import yaml

from tests.runs import recipe
from tests.tiny import save_tiny
from tunesmith.cli.main import main


def a_row(tmp_path, row):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" + json.dumps(row) + "\n")


def broken_json(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": \n')


def without_weights(tmp_path):
    (tmp_path / "model-llama" / "model.safetensors").unlink()


def pickled(tmp_path):
    (tmp_path / "model-llama" / "model.safetensors").rename(tmp_path / "model-llama" / "pytorch_model.bin")


def existing_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("model: mine")


def chat_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")


def nothing(tmp_path):
    pass


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
SCORED = PAIR | {"chosen_score": 2.0, "rejected_score": 1.0}
RANKED = {"prompt": "a", "answers": ["b", "c"]}


def preferred(row, before=PAIR):
    return lambda tmp_path: (tmp_path / "rows.jsonl").write_text(json.dumps(before) + "\n" + json.dumps(row) + "\n")


CASES = {
    "unknown key": (nothing, ["train.lerning_rate=1"], ["train.lerning_rate", "learning_rate"]),
    "unknown key at the root": (nothing, ["sede=1"], ["sede", "seed"]),
    "missing file": (lambda path: (path / "rows.jsonl").rename(path / "rowz.jsonl"), [], ["rows.jsonl", "rowz.jsonl"]),
    "broken json": (broken_json, [], ["rows.jsonl:2", "line 2"]),
    "missing field": (lambda path: a_row(path, {"prompt": "a"}), [], ["rows.jsonl:2:completion"]),
    "empty field": (lambda path: a_row(path, {"prompt": "a", "completion": " "}), [], ["rows.jsonl:2:completion", "expected text"]),
    "too long": (lambda path: a_row(path, {"prompt": "a", "completion": "b " * 90}), ["train.max_length=50"], ["rows.jsonl:2", "max_length"]),
    "nothing to learn": (
        nothing, ["objective.overlong=truncate", "train.max_length=2"], ["nothing to learn"],
    ),
    "unknown model": (nothing, ["model=smollm2-135n"], ["smollm2-135n", "smollm2-135m"]),
    "no weights": (without_weights, [], ["has no weights", "model.safetensors"]),
    "pickle": (pickled, [], ["pytorch_model.bin", "pickle"]),
    "template outside the sandbox": (
        chat_rows, ["data.template=\"{{ cycler.__init__.__globals__ }}{% for m in messages %}{{ m.content }}{% endfor %}\""], ["template", "sandbox"],
    ),
    "existing run": (existing_run, [], ["exists already", "--resume", "--out"]),
    "a module that is not there": (nothing, ["adaptation={type: lora, target_modules: [q_porj]}"], ["q_porj", "q_proj"]),
    "rank 0": (nothing, ["adaptation={type: lora, r: 0}"], ["adaptation.r", "greater than 0", "got 0"]),
    "a negative alpha": (nothing, ["adaptation={type: lora, lora_alpha: -1}"], ["adaptation.lora_alpha", "greater than 0", "-1"]),
    "a rank above a layer": (nothing, ["adaptation={type: lora, r: 17}"], ["rank 17", "self_attn.k_proj", "32 x 16", "r: {default: 17, k_proj: 16}"]),
    "a negative rank of one layer": (nothing, ["adaptation={type: lora, r: {default: 8, q_proj: -1}}"], ["adaptation.r.q_proj", "got -1", "greater than 0"]),
    "an alpha of true": (nothing, ["adaptation={type: lora, lora_alpha: {default: true}}"], ["adaptation.lora_alpha.default", "a number", "got True"]),
    "ranks without a default": (nothing, ["adaptation={type: lora, r: {q_proj: 4}}"], ["adaptation.r", "`default` is missing"]),
    "a pattern that is none": (nothing, ["adaptation={type: lora, r: {default: 4, 'q_(': 2}}"], ["adaptation.r", "'q_('", "no pattern"]),
    "peft's key of ranks": (nothing, ["adaptation={type: lora, rank_pattern: {q_proj: 4}}"], ["`adaptation.rank_pattern`", "Here it is `'adaptation.r={default: 8, q_proj: 4}'`"]),
    "peft's key of alphas": (nothing, ["adaptation={type: lora, alpha_pattern: {q_proj: 4}}"], ["`adaptation.alpha_pattern`", "Here it is `'adaptation.lora_alpha={default: 16, q_proj: 4}'`"]),
    "an unknown start": (nothing, ["adaptation={type: lora, init_lora_weights: pisa}"], ["init_lora_weights", "'pisa'", "pissa_niter_N"]),
    "a start that is not here": (nothing, ["adaptation={type: lora, init_lora_weights: loftq}"], ["loftq", "quantisation", "GPU", "qlora"]),
    "a start of other numbers": (nothing, ["adaptation={type: lora, init_lora_weights: false}"], ["random numbers", "expected", "gaussian"][:1]),
    "a start under dora": (nothing, ["adaptation={type: lora, init_lora_weights: pissa, use_dora: true}"], ["use_dora", "init_lora_weights"]),
    "a rank for no layer": (nothing, ["adaptation={type: lora, r: {default: 8, q_porj: 2}}"], ["adaptation.r.q_porj", "`q_proj`"]),
    "an alpha for no layer": (nothing, ["adaptation={type: lora, lora_alpha: {default: 16, q_porj: 2.0}}"], ["adaptation.lora_alpha.q_porj", "`q_proj`"]),
    "a LoRA on a block": (nothing, ["adaptation={type: lora, target_modules: [mlp]}"], ["layers.0.mlp", "LlamaMLP", "down_proj, gate_proj, up_proj"]),
    "a LoRA on a norm": (nothing, ["adaptation={type: lora, target_modules: [input_layernorm]}"], ["layers.0.input_layernorm", "LlamaRMSNorm", "Leave it out"]),
    "targets that are no expression": (nothing, ["adaptation={type: lora, target_modules: '('}"], ["adaptation.target_modules", "'('", "no regular expression"]),
    "parts that are no expression": (nothing, ["adaptation={type: features, target_modules: '('}"], ["adaptation.target_modules", "'('", "no regular expression"]),
    "a target trained whole": (nothing, ["adaptation={type: lora, target_modules: [v_proj, q_proj], modules_to_save: [q_proj]}"], ["target_modules names model.layers.0.self_attn.q_proj", "only one"]),
    "a target in what is trained whole": (
        nothing, ["adaptation={type: lora, target_modules: [q_proj], modules_to_save: [self_attn]}"], ["layers.0.self_attn.q_proj", "trains model.layers.0.self_attn whole"],
    ),
    "a pattern in what is trained whole": (
        nothing, ["adaptation={type: lora, target_modules: '.*[qk]_proj', modules_to_save: [self_attn]}"], ["self_attn.q_proj", "trains model.layers.0.self_attn whole"],
    ),
    "everything trained whole": (nothing, ["adaptation={type: lora, modules_to_save: [layers]}"], ["has none besides model.layers, which is trained whole", "adaptation.modules_to_save"]),
    "bottlenecks on what is trained whole": (nothing, ["adaptation={type: bottleneck, modules_to_save: [down_proj]}"], ["layers.0.mlp.down_proj", "only one"]),
    "bottlenecks in what is trained whole": (nothing, ["adaptation={type: bottleneck, modules_to_save: [mlp]}"], ["layers.0.mlp.down_proj", "layers.0.mlp whole"]),
    "half of the bottlenecks trained whole": (
        nothing, ["adaptation={type: bottleneck, variant: houlsby, modules_to_save: [down_proj]}"], ["layers.0.mlp.down_proj", "only one"],
    ),
    "a layer that is not there": (nothing, ["adaptation={type: lora, layers_to_transform: [0, 9]}"], ["no layer 9", "layers 0 to 1"]),
    "continuing what is no adapter": (nothing, ["adapter=continue", "adaptation=lora"], ["is not an adapter", "Leave the key out"]),
    "new tokens under ia3": (nothing, ["add_tokens=[<tool>]", "adaptation=ia3"], ["ia3", "adaptation=lora, which keeps them, or adaptation=full"]),
    "an unknown schedule": (nothing, ["train.lr_scheduler_type=lineer"], ["lineer", "linear"]),
    "longer than the window": (nothing, ["train.max_length=4096"], ["4096", "512"]),
    "an infinite rate": (nothing, ["train.learning_rate=.inf"], ["train.learning_rate", "finite", "inf"]),
    "a pair without a side": (preferred({"prompt": "a", "chosen": "b"}), ["objective=dpo"], ["rows.jsonl:2:rejected", "expected"]),
    "an empty side": (preferred({"prompt": "a", "chosen": "b", "rejected": ""}), ["objective=dpo"], ["rows.jsonl:2:rejected"]),
    "a ranking of one": (preferred({"prompt": "a", "answers": ["b"]}, RANKED), ["objective=reward", "samples={}"], ["rows.jsonl:2:answers", "two answers or more, got 1"]),
    "a score that is no number": (
        preferred({"prompt": "a", "chosen": "b", "rejected": "c", "chosen_score": float("inf"), "rejected_score": 1.0}, SCORED),
        ["objective=reward", "samples={}"], ["rows.jsonl:2:chosen_score", "finite"],
    ),
    "beta 0": (preferred(PAIR), ["objective={type: dpo, beta: 0}"], ["objective.beta", "greater than 0", "got 0"]),
    "an infinite beta": (preferred(PAIR), ["objective={type: dpo, beta: .inf}"], ["objective.beta", "finite", "got inf"]),
    "another reference": (preferred(PAIR), ["objective={type: dpo, reference: gpt2}"], ["objective.reference", "unknown key"]),
    "no loss of dpo": (preferred(PAIR), ["objective={type: dpo, loss_type: sppo}"], ["objective.loss_type", "'ipo'", "got 'sppo'"]),
    "dropout in a log-probability": (preferred(PAIR), ["objective=dpo", "adaptation={type: lora, lora_dropout: 0.1}"], ["lora_dropout", "dpo"]),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["train", "check"])
@pytest.mark.parametrize("case", CASES)
def test_refused_with_a_message_and_nothing_started(case, verb, tmp_path, capsys):
    spoil, overrides, said = CASES[case]
    if case == "existing run" and verb == "check":
        pytest.skip("check writes no run folder")
    made = recipe(tmp_path, "llama", {"type": "sft"})
    if case == "template outside the sandbox":
        save_tiny("llama", tmp_path / "model-llama")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(made))
    spoil(tmp_path)
    before = sorted(str(path) for path in (tmp_path / "run").rglob("*")) if (tmp_path / "run").exists() else None
    out = ["--out", str(tmp_path / "run")] if verb == "train" else []
    assert main([verb, str(file), *overrides, *out]) == 2
    message = capsys.readouterr().err
    for part in said:
        assert part in message.replace("\n", " ") or part in message, message
    assert "Traceback" not in message
    after = sorted(str(path) for path in (tmp_path / "run").rglob("*")) if (tmp_path / "run").exists() else None
    assert after == before


def test_yaml_with_a_python_tag_runs_nothing(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    assert main(["train", str(file), "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "made").exists() and "tag" in capsys.readouterr().err


def test_json_errors_are_one_object(tmp_path, capsys):
    assert main(["train", str(tmp_path / "none.yaml"), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert "none.yaml" in found["error"]["message"]


@pytest.mark.parametrize("typed", ["garbage", "hub:garbage", "a/b/c", "a b/c"])
def test_the_error_shows_an_unknown_data_set_as_it_was_typed(typed, capsys):
    assert main(["data", "pull", typed]) == 2
    said = capsys.readouterr().err
    assert f"{typed!r} is no name" in said and "OWNER/NAME" in said and "data.train" not in said


def test_one_problem_and_one_row_are_printed_in_the_singular(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": " "}\n')
    assert main(["data", "lint", str(tmp_path / "rows.jsonl")]) == 2
    said = capsys.readouterr().out
    assert "; 1 row = 0 kept + 1 rejected" in said and said.endswith("1 problem, 0 rows in both train and eval\n")
