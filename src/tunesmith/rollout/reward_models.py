"""Rewards that are models: a reward model of tunesmith, or any sequence classifier of transformers.

A reward model reads the text of prompt and answer, rendered by its own chat template and tokenised by its own
tokenizer, as ``tunesmith score`` does. It is frozen. Where it is a LoRA on the policy's base, it is attached to
the policy's network instead of loading the base again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from tunesmith.data.rows import Chat, Message, Text, TextOrTurns
from tunesmith.errors import ModelError, RecipeError, RewardError
from tunesmith.json_types import JsonObject
from tunesmith.rollout.reward_config import Completion, RewardKeys

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from tunesmith.data.batch.pack import Batch, Example
    from tunesmith.rollout.reward_adapter import RewardAdapter
    from tunesmith.rollout.session_protocol import Session

BUDGET_TOKENS = 8192
"""Tokens of a forward pass to begin with, padding included; it is halved where they do not fit into memory."""


class ModelReward(RewardKeys):
    """The number that a saved model gives to a prompt with its answer."""

    type: Literal["model"] = "model"
    path: str = Field(
        description="a run or a folder of a reward model or classifier, or its name in the catalog"
    )
    label: str | None = Field(
        None, description="the class whose number is the reward, for a classifier of several"
    )
    output: Literal["logit", "probability"] = Field("logit", description="probability = between 0 and 1")
    share_base: bool = Field(
        True,
        description="attach a LoRA on the policy's base to the policy's network; false = load a second copy of the base",
    )

    def default_name(self) -> str:
        path = Path(self.path)
        name = path.parent.name if path.name == "model" and path.parent.name else path.name
        return re.sub(r"[^\w.-]", "_", name) or "model"

    def scorer(self, place: str, tokenizer: PreTrainedTokenizerBase) -> RewardModel:
        try:
            return RewardModel(self, place, tokenizer)
        except ModelError as error:
            raise RecipeError(f"{place}.path: {error}") from None


class RewardModel:
    """The scorer of a ModelReward. Its weights are loaded by ``open``, or by the first call."""

    def __init__(self, keys: ModelReward, place: str, policy_tokenizer: PreTrainedTokenizerBase) -> None:
        from tunesmith.models import network
        from tunesmith.models.find import record
        from tunesmith.models.find.locate import locate
        from tunesmith.models.load import head_loading, load

        self.keys, self.place = keys, place
        self.folder = locate(keys.path)
        if load.head_of(self.folder) != "score":
            raise RecipeError(
                f"{place}.path: {keys.path} has no head that scores a text.\n"
                "  Train one with objective: reward, or name a sequence classifier."
            )
        self.tokenizer = load.load_tokenizer(self.folder)
        self.config = load.load_config(self.folder)
        head_loading.apply_head_config(self.config, record.head(self.folder.path).get("config") or {})
        self.label = _label(self.config, keys, place)
        self.is_causal, self.averages = network.is_causal(self.config), network.pooling(self.config) == "mean"
        trained = record.trained(self.folder.path)
        rows = trained.get("rows") or []
        self.plain = bool(rows) and "Chat" not in rows
        """It was trained on texts without a chat template."""
        self.window = trained.get("max_length") or network.context_window(self.config)
        self.notes = self._notes(policy_tokenizer)
        self._network: PreTrainedModel | None = None
        self._attached: RewardAdapter | None = None
        self._device: torch.device | None = None
        self._dtype: torch.dtype | None = None

    def _notes(self, policy: PreTrainedTokenizerBase) -> list[str]:
        what = [
            name
            for name, own, other in (
                ("tokenizer", _tokens(self.tokenizer), _tokens(policy)),
                ("chat template", self.tokenizer.chat_template, policy.chat_template),
            )
            if own != other
        ]
        if not what:
            return []
        listed = " and ".join(what)
        return [
            f"reward model {self.keys.path}: the policy has another {listed}, so the text of its answers is tokenised again"
        ]

    def open(self, run: Session) -> None:
        """Decide between a second adapter and a second network. Call it before anything is sampled.

        An adapter is attached now, in every process; a network is loaded by the first call that scores.
        """
        if self._device is not None:
            return
        self._device, self._dtype = run.device, run.model.dtype
        from tunesmith.rollout import reward_adapter

        why: str | None = "share_base is false"
        if self.keys.share_base:
            why = reward_adapter.why_not(run.model, self.folder, self.config)
        if why is None:
            name = self.keys.name or self.keys.default_name()
            self._attached = reward_adapter.attach(run, self.folder, name)
            how = "attached to the policy's network as a second adapter"
        else:
            how = f"loaded as a second network, because {why}"
        run.note(f"reward model {self.keys.path}: {how}; {self._size(run.model.dtype)}")

    def _size(self, dtype: torch.dtype) -> str:
        """Return the memory and the parameters of the weights that the reward model adds."""
        from tunesmith.models.find import headers

        parts = [(self.folder.path, "model" if self.folder.base is None else "adapter_model")]
        if self.folder.base is not None and self._attached is None:
            parts.append((self.folder.base, "model"))
        tensors = [one for part in parts for one in headers.read_tensors(*part).values()]
        count = sum(tensor.count for tensor in tensors)
        return f"{count * dtype.itemsize / 1e6:,.2f} MB ({count:,} parameters)"

    def __call__(self, answers: Sequence[Completion]) -> np.ndarray:
        from tunesmith.data.batch.pack import PADDED
        from tunesmith.data.batch.shared_prompts import Sizes
        from tunesmith.models import forward_groups

        examples = [self._encode(answer) for answer in answers]
        lengths = np.array([len(example["input_ids"]) for example in examples])
        forward, device = self._forward()
        results = forward_groups.run_groups(
            lambda group: forward(self._batch([examples[index] for index in group])),
            Sizes(lengths, np.ones_like(lengths)), BUDGET_TOKENS, PADDED, device,
            lambda index: f"the reward of {answers[index].name}",
        )  # fmt: skip
        rewards = np.zeros(len(answers))
        for group, logits in results:
            rewards[group] = self._chosen(logits)
        return rewards

    def _forward(self) -> tuple[Callable[[Batch], Tensor], torch.device]:
        """Return the function from a batch to logits (rows, labels), and the device of the network."""
        import torch

        from tunesmith.data.batch.pack import to_device
        from tunesmith.models.heads import task_heads

        device = self._device or torch.device("cpu")
        if self._attached is not None:
            return self._attached.logits, device
        if self._network is None:
            self._network = self._loaded(device)
        network = self._network

        @torch.no_grad()
        def logits(batch: Batch) -> Tensor:
            return task_heads.score_logits(network, to_device(batch, device))

        return logits, device

    def _loaded(self, device: torch.device) -> PreTrainedModel:
        from tunesmith.models.load import load, probe

        network = load.load_model(self.folder, head="score", dtype=self._dtype)
        probe.verify_probe(self.folder.path, network, self.tokenizer)
        return network.requires_grad_(False).to(device)

    def _encode(self, answer: Completion) -> Example:
        """The tokens that the model reads. Where they are too many, the prompt is cut from the left."""
        example = self._conversation(answer) if self.is_causal else self._pair(answer)
        length = len(example["input_ids"])
        if self.window is not None and length > self.window:
            raise RewardError(
                f"reward model {self.keys.path}: {answer.name} has {length} tokens without its prompt, and the model reads "
                f"at most {self.window}.\n  Lower objective.max_new_tokens, or name another model."
            )
        return example

    def _conversation(self, answer: Completion) -> Example:
        """Prompt and answer as training encodes a prompt with a response."""
        from tunesmith.data.encode import rankings
        from tunesmith.data.row_problems import RowFault
        from tunesmith.data.rows import Ranking

        has_template = bool(self.tokenizer.chat_template) and not self.plain
        asked = answer.row.asked(has_template)
        if has_template and isinstance(asked, Chat):
            response: Message = {"role": "assistant", "content": answer.text}
            row = Ranking(asked.messages, ((response,),), (0,), tools=asked.tools)
        else:
            text = asked.text if isinstance(asked, Text) else _joined(asked.messages)
            row = Ranking(text, (answer.text,), (0,))
        try:
            ((example,),) = rankings.encode(
                [row], self.tokenizer, max_length=self.window, overlong="truncate"
            )
        except (RowFault, ValueError):  # the template rewrites the answer, or no token of the prompt is left
            return self._as_generated(row.prompt, answer)
        return {"input_ids": example["input_ids"]}

    def _as_generated(self, prompt: TextOrTurns, answer: Completion) -> Example:
        """The prompt as generation reads it, then the answer and the end token."""
        from tunesmith.data.encode import conversations

        asked = Text(prompt) if isinstance(prompt, str) else prompt
        before = conversations.prompt_ids(asked, self.tokenizer)
        ids = self.tokenizer(answer.text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        room = len(before) if self.window is None else max(0, self.window - len(ids))
        return {"input_ids": np.array([*before[len(before) - min(room, len(before)) :], *ids], np.int32)}

    def _pair(self, answer: Completion) -> Example:
        """Prompt and answer as an encoder reads two texts."""
        from tunesmith.data.encode import texts

        prompt = answer.row.prompt if isinstance(answer.row.prompt, str) else _joined(answer.row.prompt)
        (example,) = texts.encode([(prompt, answer.text)], self.tokenizer, texts.PAIR_TEMPLATE)
        surplus = len(example["input_ids"]) - (self.window or len(example["input_ids"]))
        if surplus > 0:
            ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
            rest = self.tokenizer.decode(ids[surplus:], skip_special_tokens=True)
            (example,) = texts.encode([(rest, answer.text)], self.tokenizer, texts.PAIR_TEMPLATE)
        return example

    def _batch(self, examples: Sequence[Example]) -> Batch:
        from tunesmith.data.batch import pack

        lengths = [len(example["input_ids"]) for example in examples]
        if self.averages:
            read = [np.arange(length) for length in lengths]
        else:
            read = [np.array([length - 1 if self.is_causal else 0]) for length in lengths]
        batch = pack.with_positions(examples, pack.PADDED, read)
        del batch["position_ids"]  # padding is on the right, so the network's own numbers are right
        return batch

    def _chosen(self, logits: Tensor) -> np.ndarray:
        import torch

        values = logits.double().cpu()
        if self.keys.output == "probability":
            several = values.shape[1] > 1 and self.config.problem_type != "multi_label_classification"
            values = torch.softmax(values, -1) if several else torch.sigmoid(values)
        return values[:, self.label].numpy()


def _label(config: PreTrainedConfig, keys: ModelReward, place: str) -> int:
    """The column of the logits that is the reward. Raises RecipeError unless the recipe names one of several."""
    from tunesmith.suggestions import did_you_mean

    names = {str(name): int(number) for number, name in config.id2label.items()}
    if keys.label is not None and keys.label not in names:
        raise RecipeError(
            f"{place}.label: {keys.path} has no class {keys.label!r}. {did_you_mean(keys.label, names)}"
        )
    if keys.label is None and len(names) > 1:
        raise RecipeError(
            f"{place}: {keys.path} has {len(names)} classes. Name the one whose number is the reward: "
            f"{place}.label, one of {', '.join(names)}."
        )
    return names[keys.label] if keys.label is not None else 0


def _joined(turns: Sequence[JsonObject]) -> str:
    """The contents of turns as one text, for a model that reads no turns."""
    return "\n\n".join(str(turn["content"]) for turn in turns if turn.get("content"))


def _tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    """All that decides which tokens a text becomes."""
    return (
        tokenizer.get_vocab(),
        str(tokenizer.backend_tokenizer.normalizer),
        str(tokenizer.backend_tokenizer.pre_tokenizer),
    )
