"""The update does not depend on how a step is split, laid out, or shared over processes."""

import json
import os
import socket
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice, product

import pytest
import torch

import tunesmith
from tests import processes
from tests.runs import apart, model_folder, recipe, weights
from tests.shortened import shortened
from tests.tiny import TINY
from tunesmith.recipe import parse
from tunesmith.runs import metrics_file
from tunesmith.train import evaluation, loop, setup

SPLITS = [{"micro_batch_tokens": 1}, {"micro_batch_tokens": 60}, {"packing": "off"}, {"packing": "off", "micro_batch_tokens": 90}]
ADAPTATIONS = {"full": "full", "lora": {"type": "lora", "r": 4}, "lora-dropout": {"type": "lora", "r": 4, "lora_dropout": 0.3}}
OTHERS = {
    "features": {"type": "features", "train_last": 1},
    "head": {"type": "features", "target_modules": ["lm_head"]},
    "qlora": {"type": "qlora", "r": 4, "lora_dropout": 0.3},
    "bottleneck": {"type": "bottleneck", "bottleneck_size": 4, "variant": "houlsby", "dropout": 0.3},
    "prefix": {"type": "prefix", "num_virtual_tokens": 4},
    "projected": {"type": "prefix", "num_virtual_tokens": 4, "prefix_projection": True},
    "prompt": {"type": "prompt", "num_virtual_tokens": 4},
    "ia3": "ia3",
}
"""What a row's loss is, is the objective's affair and the same for all: these are split with one of them."""


def needs_bitsandbytes(adaptation):
    if adaptation == "qlora":
        pytest.importorskip("bitsandbytes")


def gradients(job, step):
    """The gradients of a step by name, as one vector each; nothing is updated."""
    job.model.train()
    micro = step.micro_batches(job.budget, job.layout)
    total = float(sum(job.objective.count(one.batch) for one in micro))
    loop.accumulation(job)(job, step, micro, total, job.update.backward)
    found = {name: gradient.clone() for name, gradient in job.update.masters.gradients().items()}
    job.update.clear_gradients()
    return found


def built(made, folder, packing):
    """A run that is ready for its first step."""
    ready = setup.read(parse({**made, "train": {**made["train"], "packing": packing}}), torch.device("cpu"), lambda line: None)
    network = setup.build(ready, folder)
    return ready, loop.Job(
        model=network.model, objective=ready.objective, update=network.update, source=ready.source, config=ready.recipe.train,
        layout=network.fast_path.layout, budget=WHOLE, device=ready.device, noise=network.noise,
        log=lambda record: None, evaluate=lambda at: None, save=lambda at: None,
    )  # fmt: skip


WHOLE = 10**6
BUDGETS = (WHOLE, 60, 1)


def assert_no_split_matters(made, folder):
    """Gradients of the first two steps, and the evaluation after them, are those of the undivided packed step under every
    budget, packed and padded. The second step counts because B of a fresh LoRA is zero in the first, and with it A's gradient."""
    expected, figures = None, None
    for packing in ("auto", "off"):
        ready, job = built(made, folder, packing)
        found = []
        for step in islice(job.source.steps(1), 2):
            for budget in BUDGETS:
                job.budget = budget
                found.append((budget, gradients(job, step)))
            job.budget = WHOLE
            loop.train_step(job, step)
        expected = expected or [of_step for budget, of_step in found if budget == WHOLE]
        for number, (budget, of_step) in enumerate(found):
            whole = expected[number // len(BUDGETS)]
            norm = sum(float(value.double().square().sum()) for value in whole.values()) ** 0.5
            assert of_step.keys() == whole.keys() and norm > 0
            assert apart(of_step, whole) <= 1e-5 * norm, f"packing {packing}, {budget} tokens, step {1 + number // len(BUDGETS)}"
        for budget in (WHOLE, 1):
            of_data, _ = evaluation.measure(job.model, job.objective, ready.data.train, job.layout, budget, job.device)
            figures = figures or of_data
            assert of_data == pytest.approx(figures, rel=1e-5), f"packing {packing}, {budget} tokens"


CELLS = [*product(TINY, ADAPTATIONS), *product(("llama", "gpt2", "mistral"), OTHERS)]
SHORT = [
    *product(TINY, ["lora-dropout"]),
    *product(["llama", "gpt2", "gemma3"], ["full"]),
    *product(["llama", "mistral"], ["lora"]),
    *product(["llama"], OTHERS),
    *product(["gpt2"], ["bottleneck", "projected", "ia3"]),
    *product(["mistral"], ["qlora", "prefix", "prompt"]),
]
"""Every architecture and every adaptation, packed and padded."""


@pytest.mark.parametrize(("name", "adaptation"), shortened(CELLS, SHORT))
def test_any_split_makes_the_same_gradients_and_evaluation(name, adaptation, tmp_path):
    needs_bitsandbytes(adaptation)
    chosen = {**ADAPTATIONS, **OTHERS}[adaptation]
    assert_no_split_matters(recipe(tmp_path, name, "sft", chosen, learning_rate=1e-3, optim_args={"eps": 1e-3}), tmp_path)


def chats(folder, **keys):
    """A recipe of rows that begin with one of two system messages, or with none."""
    made, systems = (
        recipe(folder, **keys),
        ["answer the question of the user", "the capital of France is Paris. question answer", None],
    )
    rows = []
    for number in range(12):
        turns = [
            ("user", f"question {'user ' * (number % 4)}{number}?"),
            ("assistant", f"answer {number}. {'Paris ' * (number % 3)}"),
        ]
        system = systems[number % 4 % 3]
        turns = [("system", system), *turns] if system else turns
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


@pytest.mark.parametrize(
    "name", shortened([name for name in TINY if name not in ("mistral", "gemma3")], ["llama", "gpt2", "gemma"])
)
def test_a_beginning_that_rows_share_changes_no_gradient_and_no_evaluation(name, tmp_path):
    made = chats(tmp_path, name=name, learning_rate=1e-3, optim_args={"eps": 1e-3})
    _, job = built(made, tmp_path, "auto")
    step = next(job.source.steps(1))
    [micro] = step.micro_batches(WHOLE, replace(job.layout, lanes=1))
    assert job.layout.shared and micro.tokens == micro.batch["input_ids"].numel() < 0.9 * sum(micro.lengths)
    assert_no_split_matters(made, tmp_path)


@pytest.mark.parametrize("change", [{"adaptation": OTHERS["prefix"]}, {"neftune_noise_alpha": 5.0}, {"packing": "off"}])
def test_rows_with_tokens_or_noise_of_their_own_share_nothing(change, tmp_path):
    _, job = built(chats(tmp_path, **change), tmp_path, change.get("packing", "auto"))
    micro = next(job.source.steps(1)).micro_batches(WHOLE, job.layout)
    assert not job.layout.shared and all("behind" not in one.batch for one in micro)


@pytest.mark.parametrize("name", shortened(TINY, ["qwen3", "gpt2", "gemma3"]))
def test_any_split_of_documents_makes_the_same_gradients_and_evaluation(name, tmp_path):
    made = recipe(tmp_path, name, "cpt", ADAPTATIONS["lora-dropout"], learning_rate=1e-3, optim_args={"eps": 1e-3})
    assert_no_split_matters(made, tmp_path)


def test_model_dropout_makes_the_same_gradients_for_any_split(tmp_path):
    model_folder(tmp_path, "gpt2", resid_pdrop=0.2, embd_pdrop=0.1, attn_pdrop=0.1)
    made = recipe(tmp_path, "gpt2", learning_rate=1e-3, optim_args={"eps": 1e-3})
    assert_no_split_matters(made, tmp_path)
    first, second = (
        gradients(job, next(job.source.steps(1)))
        for _, job in (built({**made, "seed": seed}, tmp_path, "auto") for seed in (0, 1))
    )
    assert apart(first, second) > 1e-3, "nothing was dropped"


DRAWN_AND_RECOMPUTED = {"neftune_noise_alpha": 5.0, "gradient_checkpointing": True}


NOISED = [*product(["llama", "gpt2"], ["lora-dropout", "bottleneck", "prefix", "prompt"])]


@pytest.mark.parametrize(
    ("name", "adaptation"),
    shortened(NOISED, [("llama", "lora-dropout"), ("gpt2", "bottleneck"), ("gpt2", "prefix"), ("llama", "prompt")]),
)
def test_noise_on_the_embeddings_and_recomputed_layers_make_the_same_gradients_for_any_split(name, adaptation, tmp_path):
    model_folder(tmp_path, name, **({"resid_pdrop": 0.2, "embd_pdrop": 0.1} if name == "gpt2" else {}))
    chosen = {**ADAPTATIONS, **OTHERS}[adaptation]
    made = recipe(tmp_path, name, "sft", chosen, learning_rate=1e-3, optim_args={"eps": 1e-3}, **DRAWN_AND_RECOMPUTED)
    assert_no_split_matters(made, tmp_path)


LAUNCHED = """
import sys, json, tunesmith
for recipe, out in json.loads(sys.argv[1]):
    tunesmith.train(recipe, out=out)
"""


def in_two_processes(runs):
    """Train each (recipe, folder), one after the other, in two processes that start once."""
    command = [sys.executable, "-c", LAUNCHED, json.dumps([(made, str(folder)) for made, folder in runs])]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes.run_together([(command, {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")])


def same_run(one, other, deciding="eval_loss"):
    """The weights of two finished runs, and what they said on the way. ``deciding``: the figure of an evaluation."""
    assert apart(weights(one / "model"), weights(other / "model")) <= 1e-6, other.name
    for kind, figure in (("eval", deciding), ("train", "update_ratio")):
        ours, theirs = (
            [record[figure] for record in metrics_file.read(run / "metrics.jsonl") if record["kind"] == kind]
            for run in (one, other)
        )
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6), other.name


@pytest.mark.long
def test_two_processes_make_the_update_of_one(tmp_path):
    """With every adaptation; ``test_every_objective`` has three of them."""
    chosen = {"full": ("full", {}), "lora": (ADAPTATIONS["lora-dropout"], DRAWN_AND_RECOMPUTED)}
    chosen |= {name: (adaptation, {}) for name, adaptation in OTHERS.items() if name != "qlora" or find_spec("bitsandbytes")}
    runs = {}
    for name, (adaptation, more) in chosen.items():
        made = recipe(tmp_path, "llama", "sft", adaptation, learning_rate=1e-3, optim_args={"eps": 1e-3}, eval_steps=2, **more)
        made["data"]["eval"] = {"path": str(tmp_path / "rows.jsonl")}
        tunesmith.train(made, out=tmp_path / name)
        runs[name] = (made, tmp_path / f"{name}-in-two")
    in_two_processes(list(runs.values()))
    for name, (_, both) in runs.items():
        assert json.loads((both / "manifest.json").read_text())["processes"] == 2
        same_run(tmp_path / name, both)
