"""Reward models against the stock forward of the saved model; attached to the policy, alone, and refused."""

from __future__ import annotations

import copy
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import tunesmith
from tests.data.tokenizers import tokenizer_of
from tests.models.adapters import save_adapter
from tests.rollout.completions import answered
from tests.rollout.sampling import made
from tests.runs import history, model_folder, preferences, recipe
from tests.tiny import ENCODERS, encoder_tokenizer, save_tiny, tiny_config
from tunesmith.data.encode import conversations
from tunesmith.data.rows import Chat
from tunesmith.errors import RecipeError, RewardError
from tunesmith.models.find.locate import locate
from tunesmith.models.heads import lm_head
from tunesmith.models.load import load
from tunesmith.models.load.load import load_model
from tunesmith.rollout import reward_adapter
from tunesmith.rollout.reward_models import ModelReward
from tunesmith.runs import run_folder

Q, S = {"role": "user", "content": "What is the capital?"}, {"role": "system", "content": "Be brief."}
ANSWERS = [
    answered("Paris is the capital of France.", prompt=(Q,)),
    answered("안녕하세요. 오늘 날씨가 좋네요.", prompt=(S, Q)),
    answered("x", prompt="a question as text"),
    answered("", prompt=(Q,)),
]


def chats(count):
    turns = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in preferences(count)]
    return [{**row, **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}} for row in turns]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A base model, a policy and a reward model that are LoRAs on it, and a whole reward model."""
    import json

    folder = tmp_path_factory.mktemp("reward-models")
    base = model_folder(folder, "llama")
    save_adapter(base, folder / "policy", seed=3, r=2, target_modules=["q_proj", "v_proj"])
    rows = folder / "pairs.jsonl"
    rows.write_text("\n".join(map(json.dumps, chats(8))))
    for name, adaptation in (("rm", "lora"), ("whole", "full")):
        trained = recipe(folder, "llama", "reward", adaptation, max_steps=2)
        trained["data"]["train"] = [{"path": str(rows)}]
        tunesmith.train(trained, out=folder / name)
    return folder


def scorer(path, tokenizer=None, **keys):
    keys = {"path": str(path), **keys}
    return ModelReward(**keys).scorer("objective.rewards.0", tokenizer or load.load_tokenizer(locate(path)))


def stock(path, answers):
    """The reward of each answer alone, by the forward of transformers on the ids that training makes."""
    model, tokenizer = tunesmith.load(path)
    rewards = []
    for answer in answers:
        prompt = answer.row.asked(has_template=True).messages
        row = Chat((*prompt, {"role": "assistant", "content": answer.text}))
        ids = torch.tensor([conversations.encode([row], tokenizer)[0][0]["input_ids"].tolist()])
        with torch.no_grad():
            rewards.append(float(model(input_ids=ids).logits[0, 0]))
    return rewards


class Run:
    """The part of a session that reward models use, with a policy in memory."""

    def __init__(self, policy):
        self.model, self.device = policy, torch.device("cpu")
        self.notes = []
        self.note = self.notes.append

    @contextmanager
    def own_layers(self):
        yield


def policy_of(shelf):
    return load_model(locate(shelf / "policy"), trainable=True)


@pytest.mark.parametrize("name", ["rm", "whole"])
def test_a_reward_model_scores_as_its_own_forward_does(shelf, name):
    model = scorer(shelf / name)
    together = model(ANSWERS)
    assert together == pytest.approx(stock(shelf / name, ANSWERS), abs=1e-5)
    assert [model([answer])[0] for answer in ANSWERS] == pytest.approx(together, abs=1e-5)
    assert len(set(together.round(6))) == len(ANSWERS) and together.dtype == np.float64


def test_scoring_leaves_every_weight_as_it_was(shelf):
    model = scorer(shelf / "rm")
    model(ANSWERS)
    before = {name: tensor.clone() for name, tensor in model._network.state_dict().items()}
    model(ANSWERS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model._network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model._network.parameters())


@pytest.mark.parametrize("shortened_from", [20, 2], ids=["few layers", "many layers"])
def test_a_lora_on_the_policys_base_is_attached_and_scores_the_same(shelf, shortened_from, monkeypatch):
    """Many layers: peft rewrites ``target_modules`` from that many names on, which a tiny network does not have."""
    monkeypatch.setattr("peft.tuners.tuners_utils.MIN_TARGET_MODULES_FOR_OPTIMIZATION", shortened_from)
    policy = policy_of(shelf)
    ids = torch.tensor([[5, 17, 80, 41, 300, 9]])
    with torch.no_grad():
        before = policy(ids).logits
    flags = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    attached = scorer(shelf / "rm")
    random_state = torch.get_rng_state()
    attached.open(Run(policy))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert attached._attached is not None
    assert attached(ANSWERS) == pytest.approx(scorer(shelf / "rm")(ANSWERS), abs=1e-5)
    with torch.no_grad():
        assert torch.equal(policy(ids).logits, before) and policy.active_adapter == "default"
    now = {name.replace(".base_layer", ""): parameter.requires_grad for name, parameter in policy.named_parameters()}
    trained = {name for name, trains in now.items() if trains}
    assert trained == {name for name, trains in flags.items() if trains} and trained
    alone = scorer(shelf / "rm", share_base=False)
    alone.open(Run(policy))
    assert alone._attached is None


def tensors_of(policy):
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


@pytest.mark.parametrize("fails", [False, True])
def test_the_policys_adapter_is_in_use_again_whatever_happens(shelf, monkeypatch, fails):
    policy, attached = policy_of(shelf), scorer(shelf / "rm")
    attached.open(Run(policy))
    before, active = tensors_of(policy), []

    def outputs_at(model, batch):
        active.append(model.active_adapter)
        if fails:
            raise ValueError("the forward failed")
        return hidden(model, batch)

    hidden = lm_head.outputs_at
    monkeypatch.setattr(reward_adapter.lm_head, "outputs_at", outputs_at)
    if fails:
        with pytest.raises(ValueError, match="the forward failed"):
            attached(ANSWERS)
    else:
        attached(ANSWERS)
    assert set(active) == {attached._attached.name} and policy.active_adapter == "default"
    states = {str(module.active_adapters) for module in policy.modules() if hasattr(module, "lora_A")}
    assert states == {"['default']"}
    after = policy.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert all(parameter.requires_grad is (".default." in name) for name, parameter in policy.named_parameters())


def test_a_policy_with_a_reward_adapter_is_saved_alone(shelf, tmp_path):
    from tunesmith.adaptations import lora

    policy, attached = policy_of(shelf), scorer(shelf / "rm")
    attached.open(Run(policy))
    lora.Adaptation(lora.Config()).save(policy, tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    saved = (tmp_path / "saved" / "adapter_model.safetensors").read_bytes()
    assert saved == (shelf / "policy" / "adapter_model.safetensors").read_bytes()


def test_what_cannot_be_attached_gets_a_network_of_its_own(shelf, tmp_path):
    policy = policy_of(shelf)

    def why(path, model=policy):
        folder = locate(path)
        return reward_adapter.why_not(model, folder, scorer(path).config)

    assert why(shelf / "rm") is None
    assert "whole model" in why(shelf / "whole")
    assert "not trained with a LoRA" in why(shelf / "rm", policy.get_base_model())
    other = save_tiny("llama", tmp_path / "other", rms_norm_eps=1e-3, hidden_size=48)
    save_adapter(other, tmp_path / "policy", target_modules=["q_proj"])
    assert "other weights" in why(shelf / "rm", load_model(locate(tmp_path / "policy")))
    base = model_folder(shelf, "llama")
    dora = tmp_path / "dora"
    save_reward(base, dora, use_dora=True)
    assert "no plain LoRA" in why(dora)
    save_reward(base, tmp_path / "norms", modules_to_save=["norm", "score"])
    assert "trained model.layers.0.input_layernorm.weight whole" in why(tmp_path / "norms")


def save_reward(base, folder, **lora):
    """A reward model with an adapter that no run of ours makes."""
    from peft import LoraConfig, get_peft_model

    from tunesmith.models.load.probe import write_probe

    network = load_model(locate(base), head="score", head_config={"id2label": {0: "LABEL_0"}, "num_labels": 1})
    adapted = get_peft_model(network, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], **lora))
    adapted.save_pretrained(folder)
    tokenizer = load.load_tokenizer(locate(base))
    tokenizer.save_pretrained(folder)
    write_probe(folder, adapted, tokenizer)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Classifiers as others publish them: an encoder of three classes, a decoder of two without a chat template."""
    folder = tmp_path_factory.mktemp("classifiers")
    torch.manual_seed(0)
    labels = {0: "negative", 1: "neutral", 2: "positive"}
    from transformers import AutoConfig

    config = AutoConfig.for_model("bert", **ENCODERS["bert"], id2label=labels, label2id={name: n for n, name in labels.items()})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "bert")
    encoder_tokenizer("bert").save_pretrained(folder / "bert")
    AutoModelForSequenceClassification.from_config(tiny_config("gpt2")).save_pretrained(folder / "gpt2")
    tokenizer = copy.deepcopy(tokenizer_of("bytes"))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "gpt2")
    return folder


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_a_class_of_an_encoder_is_a_reward(classifiers, output):
    model = scorer(classifiers / "bert", label="positive", output=output)
    stock = AutoModelForSequenceClassification.from_pretrained(classifiers / "bert").eval()
    tokenizer = load.load_tokenizer(locate(classifiers / "bert"))
    expected = []
    for answer in ANSWERS:
        prompt = answer.row.prompt
        text = prompt if isinstance(prompt, str) else "\n\n".join(turn["content"] for turn in prompt)
        with torch.no_grad():
            logits = stock(**tokenizer([text], [answer.text], return_tensors="pt")).logits[0].double()
        expected.append(float(logits.softmax(-1)[2] if output == "probability" else logits[2]))
    assert model(ANSWERS) == pytest.approx(expected, abs=1e-5)


def test_a_decoder_without_a_template_reads_prompt_and_answer_as_one_text(classifiers):
    model = scorer(classifiers / "gpt2", label="LABEL_1")
    stock = AutoModelForSequenceClassification.from_pretrained(classifiers / "gpt2").eval()
    tokenizer = load.load_tokenizer(locate(classifiers / "gpt2"))
    ids = tokenizer("a question x")["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        expected = float(stock(input_ids=torch.tensor([ids])).logits[0, 1])
    assert model([answered(" x", prompt="a question")]) == pytest.approx([expected], abs=1e-5)


def test_another_tokenizer_is_reported_once(shelf, classifiers):
    assert scorer(shelf / "rm").notes == []
    (note,) = scorer(classifiers / "bert", tokenizer_of("metaspace"), label="positive").notes
    assert "the policy has another tokenizer, so" in note
    (note,) = scorer(classifiers / "bert", load.load_tokenizer(locate(shelf / "rm")), label="positive").notes
    assert "the policy has another chat template, so" in note


def test_a_classifier_with_another_tokenizer_is_the_reward_of_a_run(classifiers, tmp_path):
    path = shutil.copytree(classifiers / "bert", tmp_path / "bert")
    tokenizer_of("metaspace").save_pretrained(path)
    rewards = [{"type": "model", "path": str(path), "label": "positive", "name": "mood"}]
    tunesmith.train(made(tmp_path, type="ppo", rewards=rewards, train={"max_steps": 2, "epochs": 1.0}), out=tmp_path / "run")
    (record,) = (one for one in history(tmp_path / "run") if one["kind"] == "rollout")
    assert record["reward"] == record["reward/mood"] != 0
    notes = run_folder.read_mapping(tmp_path / "run" / "manifest.json")["notes"]
    assert [note.partition(": ")[2].partition(";")[0] for note in notes if note.startswith(f"reward model {path}")] == [
        "the policy has another tokenizer and chat template, so the text of its answers is tokenised again",
        "loaded as a second network, because it is a whole model",
    ]


def test_a_prompt_too_long_for_the_model_loses_its_left(shelf, classifiers):
    for model in (scorer(shelf / "rm"), scorer(classifiers / "bert", label="positive")):
        model.window = 40
        long, short = ({**Q, "content": start + "word " * 60} for start in ("one ", "two "))
        rewards = model([answered("yes", prompt=(turn,)) for turn in (long, short)])
        assert rewards[0] == pytest.approx(rewards[1], abs=1e-6)
        with pytest.raises(RewardError, match=r"rollout:0:0 has \d+ tokens without its prompt, and the model reads at most 40"):
            model([answered("word " * 60, prompt=(Q,))])


def test_a_model_without_such_a_head_is_refused_before_weights_are_loaded(shelf, classifiers, tmp_path):
    tokenizer = load.load_tokenizer(locate(shelf / "rm"))
    for path, keys, message in (
        (shelf / "policy", {}, r"objective\.rewards\.0\.path: .*no head that scores a text"),
        (shelf / "model-llama", {}, "no head that scores a text"),
        (tmp_path / "none", {}, r"objective\.rewards\.0\.path: "),
        (classifiers / "bert", {}, "has 3 classes.*one of negative, neutral, positive"),
        (classifiers / "bert", {"label": "positiv"}, "no class 'positiv'. Did you mean `positive`"),
    ):
        with pytest.raises(RecipeError, match=message) as caught:
            scorer(path, tokenizer, **keys)
        assert caught.value.exit_code == 2


def test_the_default_name_is_the_runs():
    assert ModelReward(path="runs/rm").default_name() == "rm"
    assert ModelReward(path="runs/my rm/model").default_name() == "my_rm"
