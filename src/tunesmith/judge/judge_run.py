"""Judge the answers of two or more systems to the same prompts: win rates, and a winner if there is one.

A system is a model, a file of answers that ``tunesmith generate --out`` wrote, or ``reference``: the answers in
the data. The folder ``out`` keeps the answers and every verdict, so a run that was interrupted goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from tunesmith import files
from tunesmith.data.read.prompts import AskedPrompt, joined_turns, read_prompts
from tunesmith.errors import UserError
from tunesmith.evaluate.prompt_answers import GreedyAnswers
from tunesmith.evaluate.trained_reading import make_source
from tunesmith.json_types import JsonObject
from tunesmith.judge import examination
from tunesmith.judge.endpoint import KEY_VARIABLE, Endpoint, EndpointJudge, is_address
from tunesmith.judge.judges import Judge, LanguageModelJudge, Pair, RewardModelJudge, Verdict
from tunesmith.judge.rubric import EndpointScorer, LanguageModelScorer, Rubric, RubricJudge, read_rubric
from tunesmith.judge.verdicts import Outcome, Verdicts
from tunesmith.metrics import comparison, win_rate
from tunesmith.metrics.intervals import Interval
from tunesmith.models.find.locate import locate
from tunesmith.models.generate import decode
from tunesmith.models.load.compute_dtype import cast_and_move
from tunesmith.models.load.load import head_of, load

REFERENCE = "reference"
SHOWN_ROWS = 20

Report = Callable[[str, int], None]
"""(what is done, verdicts or answers done just now)."""


@dataclass(frozen=True)
class Answers:
    """``by_row``: row of the data file -> (text of the prompt, answer)."""

    name: str
    by_row: dict[int, tuple[str, str]]


def judge(
    systems: Sequence[str],
    judge: str,
    out: str | Path,
    *,
    data: str | None = None,
    human: str | Path | None = None,
    limit: int | None = None,
    max_new_tokens: int = 256,
    judge_model: str | None = None,
    key_variable: str = KEY_VARIABLE,
    rubric: str | None = None,
    precision: str = "auto",
    report: Report = lambda what, count: None,
) -> JsonObject:
    """Return the examination of the judge and, for each pair of systems, the win rates and a verdict.

    ``judge``: a language model, a reward model, or the address of a server (then ``judge_model`` is the name there). ``data``:
    the prompts; needed if a system is a model or ``reference``. ``human``: a file of ranked answers that
    examines the judge in addition to the built-in pairs. ``rubric``: ``general``, or a file with criteria; then the judge
    scores each answer from 1 to 5, and the higher score wins. Raises UserError, and JudgeError if a server does
    not answer; what was generated and judged before is kept in ``out``.
    """
    folder = Path(out)
    criteria = None if rubric is None else read_rubric(rubric)
    known = examination.built_in() + (examination.from_file(human) if human is not None else [])
    open_judge = partial(_open_judge, judge, judge_model, key_variable, precision, criteria)
    # what is wrong with the judge costs no answers: a server is opened at once, the name of a model is checked
    opened = open_judge() if is_address(judge) else None
    if opened is None:
        _check_judge(judge, criteria)
    answers = _answers_of(systems, data, limit, max_new_tokens, precision, folder, report)
    rows = _common_rows(answers)
    asked = opened or open_judge()
    verdicts = Verdicts(asked, folder / "judgements.jsonl")
    examined = examination.examine(verdicts, known, lambda count: report("examining the judge", count))
    compared = [
        _compare(first, second, rows, verdicts, lambda count: report("judging", count))
        for first, second in combinations(answers, 2)
    ]
    for one, adjusted in zip(compared, comparison.holm([one["p"] for one in compared]), strict=True):
        one["p"] = adjusted
        one["verdict"], one["winner"] = _verdict(one, examined)
    result: JsonObject = {
        "judge": asked.name,
        "systems": [one.name for one in answers],
        "rows": len(rows),
        "examination": {**asdict(examined), "passed": examined.passed},
        "comparisons": compared,
        "cost": asdict(verdicts.cost),
    }
    stored = {key: value for key, value in result.items() if key != "cost"}  # the same after an interruption
    files.replace_file(folder / "figures.json", json.dumps(stored, ensure_ascii=False, indent=1).encode())
    return result


def _answers_of(
    systems: Sequence[str],
    data: str | None,
    limit: int | None,
    max_new_tokens: int,
    precision: str,
    folder: Path,
    report: Report,
) -> list[Answers]:
    """Return the answers of every system. Files are read before any model is loaded."""
    if len(systems) < 2:
        systems = [*systems, REFERENCE]
    if len(set(systems)) < len(systems):
        raise UserError("a system is named twice. Name two different models or files of answers.")
    from_files = {name: _read_answers(Path(name)) for name in systems if name.endswith(".jsonl")}
    others = [name for name in systems if name not in from_files]
    prompts: list[AskedPrompt] = []
    if others:
        if data is None:
            raise UserError(
                f"{others[0]} is no file of answers (.jsonl), so prompts are needed: give --data FILE"
            )
        prompts, _ = read_prompts(make_source(data, limit=limit))
    found = []
    for name in systems:
        if name in from_files:
            found.append(Answers(name, from_files[name]))
        elif name == REFERENCE:
            found.append(Answers(name, _references(prompts, str(data))))
        else:
            written = _generated(name, prompts, max_new_tokens, precision, folder, report)
            found.append(Answers(name, written))
    return found


def _read_answers(path: Path) -> dict[int, tuple[str, str]]:
    """Read a file of ``tunesmith generate --out``. Raises UserError for anything else."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            one = json.loads(line)
            found[int(one["row"])] = _shown(one["prompt"]), str(one["answer"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}:{number} is no answer: expected an object with row, prompt and answer.\n"
                "  Type: tunesmith generate MODEL --data FILE --out answers.jsonl"
            ) from None
    if not found:
        raise UserError(f"{path} holds no answers")
    return found


def _references(prompts: Sequence[AskedPrompt], data: str) -> dict[int, tuple[str, str]]:
    found = {one.row: (one.text(), text) for one in prompts if (text := one.reference_text()) is not None}
    if not found:
        raise UserError(f"{data} has no answers to compare with. Name a second model or file of answers.")
    return found


def _shown(value: str | list[JsonObject]) -> str:
    return value if isinstance(value, str) else joined_turns(value)


def _generated(
    name: str,
    prompts: Sequence[AskedPrompt],
    max_new_tokens: int,
    precision: str,
    folder: Path,
    report: Report,
) -> dict[int, tuple[str, str]]:
    """Return a model's greedy answers. They are kept in ``folder`` while they come."""
    loaded = load(name)
    decode.check_writes(loaded[0])
    cast_and_move(loaded[0], precision)
    advance = partial(report, f"answers of {name}")
    answers = GreedyAnswers(loaded, prompts, max_new_tokens, folder, advance=advance)
    answers.check()
    return {one.row: (one.prompt, one.text) for block in answers.blocks() for one in block}


def _common_rows(answers: Sequence[Answers]) -> list[int]:
    """Return the rows that every system answered. Raises UserError if prompts of a row differ."""
    first = answers[0]
    rows = sorted(set.intersection(*(set(one.by_row) for one in answers)))
    if not rows:
        raise UserError(f"{first.name} and {answers[1].name} answered no common row")
    for one in answers[1:]:
        for row in rows:
            if one.by_row[row][0] != first.by_row[row][0]:
                raise UserError(f"row {row} has another prompt in {one.name} than in {first.name}")
    return rows


def _open_judge(
    judge: str, model: str | None, key_variable: str, precision: str, rubric: Rubric | None = None
) -> Judge:
    if is_address(judge):
        if model is None:
            raise UserError(f"{judge} is a server: name its model with --judge-model NAME")
        endpoint = Endpoint(judge, model, key_variable)
        return EndpointJudge(endpoint) if rubric is None else RubricJudge(EndpointScorer(endpoint, rubric))
    folder = locate(judge, checkpoints=True)
    if head_of(folder) == "score":
        if rubric is not None:
            raise UserError(
                f"--rubric: {judge} is a reward model, which has scores of its own. Leave it out."
            )
        return RewardModelJudge(judge, folder)
    network, tokenizer = load(judge)
    decode.check_writes(network)
    cast_and_move(network, precision)
    if rubric is not None:
        return RubricJudge(LanguageModelScorer(judge, network, tokenizer, rubric))
    return LanguageModelJudge(judge, network, tokenizer)


def _check_judge(judge: str, rubric: Rubric | None) -> None:
    """Raise UserError for a judge on this machine that cannot judge. No weight is loaded."""
    head = head_of(locate(judge, checkpoints=True))
    if head not in ("lm", "score"):
        raise UserError(
            f"{judge} cannot judge: it neither writes text nor scores answers. Name another --judge."
        )
    if head == "score" and rubric is not None:
        raise UserError(f"--rubric: {judge} is a reward model, which has scores of its own. Leave it out.")


def _compare(
    first: Answers, second: Answers, rows: Sequence[int], verdicts: Verdicts, advance: Callable[[int], None]
) -> JsonObject:
    """Judge two systems. A win counts 1, a tie 0.5; rows without a verdict are left out and counted."""
    pairs = [Pair(first.by_row[row][0], first.by_row[row][1], second.by_row[row][1]) for row in rows]
    different = [place for place, pair in enumerate(pairs) if pair.first != pair.second]
    judged = verdicts.ask([pairs[place] for place in different], advance)
    outcomes: list[Outcome | None] = ["tie"] * len(pairs)  # equal answers need no judge
    for place, one in zip(different, judged, strict=True):
        outcomes[place] = one.outcome
    given = [place for place, outcome in enumerate(outcomes) if outcome is not None]
    wins = np.array([{"first": 0.0, "tie": 0.5, "second": 1.0}[str(outcomes[place])] for place in given])
    longer = [len(pairs[place].second.split()) - len(pairs[place].first.split()) for place in given]
    terms = np.stack([wins, np.ones(len(wins))], axis=1)
    difference = comparison.difference(np.stack([1 - wins, np.ones(len(wins))], axis=1), terms)
    controlled, on_length = win_rate.length_controlled(wins.tolist(), longer)
    shown = [
        {"row": rows[place], **asdict(pairs[place]), "outcome": outcomes[place]}
        for place in given[:SHOWN_ROWS]
    ]
    scores = _scores([one.forward for one in judged])
    return {
        **({} if scores is None else {"scores": scores}),
        "first": first.name,
        "second": second.name,
        "pairs": len(given),
        "missing": len(pairs) - len(given),
        "wins": int((wins == 1).sum()),
        "ties": int((wins == 0.5).sum()),
        "losses": int((wins == 0).sum()),
        "win_rate": _as_dict(win_rate.win_rate(wins.tolist())),
        "length_controlled": _as_dict(controlled),
        "length": on_length,
        "p": 1.0 if difference is None else difference.p,
        "rows_for_ten_points": None if difference is None else difference.rows_for(0.2),
        "rows": shown,
    }


def _scores(verdicts: Sequence[Verdict]) -> JsonObject | None:
    """Return the mean scores of both systems and the interval of the paired difference; None without scores.

    Answers that are equal were not scored, and are left out."""
    known = [one.scores for one in verdicts if one.scores is not None]
    if not known:
        return None
    first, second = (
        np.stack([np.array(side), np.ones(len(known))], axis=1) for side in zip(*known, strict=True)
    )
    difference = comparison.paired_interval(first, second)
    return {
        "first": float(first[:, 0].mean()), "second": float(second[:, 0].mean()), "answers": len(known),
        "difference": _as_dict(difference),
    }  # fmt: skip


def _as_dict(interval: Interval | None) -> JsonObject | None:
    return None if interval is None else asdict(interval)


def _verdict(one: JsonObject, examined: examination.Examination) -> tuple[str, str | None]:
    """Return a sentence on two systems, and the winner's name if there is one."""
    rate, controlled = one["win_rate"], one["length_controlled"]
    if rate is None:
        return "too few pairs have a verdict to compare the systems", None
    counts = f"{one['second']} won {_percent(rate)} of {one['pairs']} pairs (a tie counts half)"
    if controlled is not None:
        counts += f", {_percent(controlled)} between answers of equal length"
    if "scores" in one:
        counts += f"; mean score {one['scores']['first']:.2f} -> {one['scores']['second']:.2f} of 5"
        if (change := one["scores"]["difference"]) is not None:
            counts += (
                f", a difference of {change['value']:+.2f} ({change['low']:+.2f} to {change['high']:+.2f})"
            )
    if not examined.passed:
        return f"no winner is named, because the judge failed its examination; {counts}", None
    sides = {_side(interval) for interval in (rate, controlled) if interval is not None}
    if one["p"] < 0.05 and len(sides) == 1 and (side := sides.pop()):
        winner = one["second"] if side > 0 else one["first"]
        loser = one["first"] if side > 0 else one["second"]
        return f"{winner} is better than {loser}: {counts}", winner
    needed = (
        f"; about {one['rows_for_ten_points']:,} pairs would show a win rate of 60%"
        if one["rows_for_ten_points"]
        else ""
    )
    return f"no difference was seen between {one['first']} and {one['second']}: {counts}{needed}", None


def _side(interval: JsonObject) -> int:
    """Return 1 or -1 if the interval lies above or below one half, else 0."""
    return int(interval["low"] > 0.5) - int(interval["high"] < 0.5)


def _percent(interval: JsonObject) -> str:
    return f"{interval['value']:.0%} ({interval['low']:.0%} to {interval['high']:.0%})"
