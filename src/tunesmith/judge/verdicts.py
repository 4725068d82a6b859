"""Ask a judge about pairs of answers in both orders, and keep every verdict in a file.

A judge may prefer the answer that it reads first. So each pair is judged twice, and an answer wins if it is
preferred in both orders; otherwise the pair is a tie (Zheng et al. 2023, arXiv:2306.05685, section 3.4).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from tunesmith import files
from tunesmith.json_types import JsonObject
from tunesmith.judge.judges import Judge, Pair, Verdict

Outcome: TypeAlias = Literal["first", "second", "tie"]


@dataclass(frozen=True)
class BothOrders:
    """``forward``: the verdict in the pair's own order; ``backward``: with the answers swapped."""

    forward: Verdict
    backward: Verdict

    @property
    def outcome(self) -> Outcome | None:
        """The answer preferred in both orders, or a tie; None if a verdict is missing."""
        first, second = self.forward.first_better, self.backward.first_better
        if first is None or second is None:
            return None
        if first > 0.5 and second < 0.5:
            return "first"
        return "second" if first < 0.5 and second > 0.5 else "tie"

    @property
    def picked_first(self) -> list[bool]:
        """For each verdict, whether the answer that the judge read first was preferred."""
        return [
            one.first_better > 0.5 for one in (self.forward, self.backward) if one.first_better is not None
        ]


@dataclass
class Cost:
    """Cost of the verdicts that were not read from the file."""

    calls: int = 0
    tokens: int = 0
    seconds: float = 0.0
    reused: int = 0


class Verdicts:
    """The verdicts of one judge in a JSONL file; a run that was interrupted goes on from it.

    A line is {"key", "first_better", "tokens", "reason"}, with "scores" of a judge by rubric. ``key`` is a hash of
    the judge's identity and the pair, so a verdict is used again only for the same judge and the same texts. Lines
    are in the order of the pairs, so the file does not depend on where a run was interrupted.
    """

    def __init__(self, judge: Judge, path: Path | None) -> None:
        self.judge, self.path = judge, path
        self.cost = Cost()
        self._known: dict[str, Verdict] = {}
        if path is not None and path.exists():
            self._read(path)

    def ask(
        self, pairs: Sequence[Pair], advance: Callable[[int], None] = lambda count: None
    ) -> list[BothOrders]:
        """Return the verdicts on each pair in both orders. ``advance`` is called with the verdicts done."""
        orders = [order for pair in pairs for order in (pair, pair.swapped)]
        keys = [self._key(pair) for pair in orders]
        missing = list(dict.fromkeys(key for key in keys if key not in self._known))
        by_key = dict(zip(keys, orders, strict=True))
        self.cost.reused += len(keys) - len(missing)
        advance(len(keys) - len(missing))
        for key, verdict in self._in_order([by_key[key] for key in missing], missing):
            self._known[key] = verdict
            self._write(key, verdict)
            advance(1)
        found = [self._known[key] for key in keys]
        return [BothOrders(*both) for both in zip(found[::2], found[1::2], strict=True)]

    def ask_again(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """Return new verdicts on each pair in its own order, without reading or writing the file."""
        found = dict(self._timed(pairs))
        return [found[place] for place in range(len(pairs))]

    def _in_order(self, pairs: Sequence[Pair], keys: Sequence[str]) -> Iterator[tuple[str, Verdict]]:
        waiting: dict[int, Verdict] = {}
        following = 0
        for place, verdict in self._timed(pairs):
            waiting[place] = verdict
            while following in waiting:
                yield keys[following], waiting.pop(following)
                following += 1

    def _timed(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Verdict]]:
        began = time.perf_counter()
        for place, verdict in self.judge(pairs) if pairs else ():
            now = time.perf_counter()
            self.cost.seconds += now - began
            self.cost.calls += 1
            self.cost.tokens += verdict.tokens
            yield place, verdict
            began = time.perf_counter()

    def _key(self, pair: Pair) -> str:
        parts = (self.judge.identity, pair.prompt, pair.first, pair.second)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]

    def _read(self, path: Path) -> None:
        """Read the file, and cut off a last line that is not complete."""
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.splitlines():
            one: JsonObject = json.loads(line)
            scores = (one["scores"][0], one["scores"][1]) if "scores" in one else None
            self._known[one["key"]] = Verdict(one["first_better"], one["tokens"], one["reason"], scores)
        if len(whole) < len(content):
            files.replace_file(path, whole)

    def _write(self, key: str, verdict: Verdict) -> None:
        if self.path is None:
            return
        known = {
            name: value for name, value in vars(verdict).items() if name != "scores" or value is not None
        }
        line = json.dumps({"key": key, **known}, ensure_ascii=False)
        files.make_folder(self.path.parent)
        with files.naming_full_disk(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
