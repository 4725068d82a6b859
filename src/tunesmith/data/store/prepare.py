"""From the recipe's ``data:`` keys to examples: read, encode, hold out, fit to a length, report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.data.check.contamination import contamination
from tunesmith.data.data_config import DataConfig, Source
from tunesmith.data.encode.templates import apply_template
from tunesmith.data.read import class_folder, hub_set
from tunesmith.data.read.source import OpenedSource, eval_sources, open_source
from tunesmith.data.row_problems import RowProblem, bad_rows_error
from tunesmith.data.rows import Chat
from tunesmith.data.store.cache import Entry
from tunesmith.data.store.data_report import Report, SourceReport, SplitReport, histogram
from tunesmith.data.store.encode_source import Built, Progress, build, shared_key
from tunesmith.data.store.encoded_rows import Encoded, Views, fit, join
from tunesmith.data.store.epoch_order import held_out, held_out_together
from tunesmith.errors import DataError, ReadOnceError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """Examples to learn from and to evaluate on, the length they fit in, and what became of every row.

    ``eval_sets``: the names of ``data.eval.sets`` (none without); example ``i`` of ``eval`` belongs to set ``eval.source[i]``.
    """

    train: Encoded
    eval: Encoded | None
    max_length: int
    report: Report
    eval_sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """A source with the examples of it that belong to one split."""

    built: Built
    opened: OpenedSource
    chosen: np.ndarray


def prepare(
    config: DataConfig,
    objective: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    window: int | None,
    seed: int,
    on_progress: Progress | None = None,
) -> Prepared:
    """Encode all sources (or find them in the cache) and apply the recipe's policies.

    ``objective`` gives ``traits`` and ``encode(rows, tokenizer)``. ``max_length``: tokens; None = the longest
    row, at most ``window`` (the model's own limit; None = no limit). The tokenizer gets its chat template here when the
    rows are conversations or the recipe names one.

    Raises DataError when rows are bad under ``bad_rows: error``, too long under the policy ``error``, or have nothing to
    learn (all, or more than ``max_unlearnable``); each lists the first rows by ``file:row``.
    """
    began = time.perf_counter()
    if max_length is not None and window is not None and max_length > window:
        raise DataError(
            f"max_length {max_length} is above the model's window of {window} tokens. Set train.max_length to at most {window}."
        )
    evaluation = eval_sources(config)
    accepted = tuple(objective.traits.rows)
    opened = [open_source(source, accepted) for source in config.train]
    opened += [_open_set(name, source, accepted) for name, source in evaluation.items()]
    template = "none: the rows are plain text"
    if config.template is not None or any(Chat in item.kinds for item in opened):
        tokenizer, template = apply_template(tokenizer, config.template)
    _survey(objective, opened[: len(config.train)])
    key = shared_key(objective, tokenizer)
    built, seconds = [], []
    for item in opened:
        start = time.perf_counter()
        built.append(build(item, objective, tokenizer, config.cache, key, on_progress))
        seconds.append(time.perf_counter() - start)
    _check_rows(built, opened, config)

    everything = [
        _Part(made, item, np.arange(len(made.entry), dtype=np.int32)) for made, item in zip(built, opened)
    ]
    if evaluation:
        train, held = everything[: len(config.train)], everything[len(config.train) :]
    else:
        train, held = _hold_out(everything, config, seed)
    longest = max((int(part.built.entry.length.max(initial=0)) for part in everything), default=0)
    limit = max_length or max(2, min(longest, window or longest))
    if objective.traits.fits_rows:  # several answers in one example: each fits, all of them together need not
        limit = max(2, longest)
    elif objective.traits.overlong == "error":
        _check_lengths(train + held, limit, window)
    shared = _shared(train, held) if held else 0
    learnt, train_report = _split(train, objective, limit, "training", config.max_unlearnable)
    sets = {
        name: _split([part], objective, limit, f"data.eval.sets.{name}", config.max_unlearnable)[1]
        for name, part in (zip(evaluation, held) if config.eval.sets else ())
    }
    tested, eval_report = (
        _split(held, objective, limit, "evaluation", config.max_unlearnable) if held else (None, None)
    )
    roles = ["train"] * len(config.train) + [f"eval {name}".strip() for name in evaluation]
    most = (objective.max_length or learnt.longest) if objective.traits.fits_rows else limit
    report = Report(
        sources=tuple(_source_report(*one) for one in zip(built, opened, roles, seconds)),
        train=train_report,
        eval=eval_report,
        eval_sets=sets,
        template=template,
        max_length=most,
        duplicates_train_eval=shared,
        contaminated=contamination(learnt, tested, tokenizer, written=objective.traits.head == "lm")
        if tested
        else None,
        cached=all(made.cached for made in built),
        seconds=time.perf_counter() - began,
    )
    return Prepared(objective.extend(learnt), tested and objective.extend(tested), most, report, tuple(sets))


def _open_set(name: str, source: Source, accepted: tuple[type, ...]) -> OpenedSource:
    """An evaluation file, opened. What is wrong with it is said with the name of its set."""
    try:
        return open_source(source, accepted)
    except DataError as error:
        raise DataError(f"data.eval.{f'sets.{name}' if name else 'path'}: {error}") from None


def _survey(objective: Any, opened: Sequence[OpenedSource]) -> None:
    """Let the objective look at the training rows. What is wrong with one is said when it is encoded, or here, where too little
    is left without the bad rows."""
    first: list[RowProblem] = []
    bad = 0

    def rows() -> Iterator[Any]:
        nonlocal bad
        for item in opened:
            if item.source.streaming:
                raise ReadOnceError(
                    f"{item.source.label} is a stream, which is read once, and what its rows can be must be known first.\n"
                    "  Leave out streaming; or name the labels: objective.labels=[...], for classify objective.problem_type, too."
                )
            for found in item.rows():
                if isinstance(found, tuple):
                    yield found[1]
                else:
                    first.extend([found][: 10 - len(first)])
                    bad += 1

    try:
        objective.scan(rows())
    except DataError as error:
        if not bad:
            raise
        raise bad_rows_error(first, bad, f"Without them {error}") from None


def _check_rows(built: Sequence[Built], opened: Sequence[OpenedSource], config: DataConfig) -> None:
    """Refuse bad rows, unless they are to be skipped and the rest of each file could be read."""
    problems = [
        RowProblem(
            **{
                **problem,
                "path": class_folder.path_in_folder(item.source.path, problem["path"]) or item.source.label,
            }
        )
        for made, item in zip(built, opened)
        for problem in made.entry.info["problems"]
    ]
    total = sum(made.entry.info["read"] - made.entry.info["kept"] for made in built)
    bad = [item.source for made, item in zip(built, opened) if made.entry.info["problems"]]
    files = " ".join(
        dict.fromkeys(word for source in bad for word in [source.path, *hub_set.split_flags(source)])
    )
    advice = f"Type `tunesmith data lint {files}` for all of them"
    if any(made.entry.info["fatal"] for made in built):
        raise bad_rows_error(
            problems, total, f"{advice}. The rest of the file cannot be read, so nothing is skipped."
        )
    if total and config.bad_rows == "error":
        raise bad_rows_error(
            problems,
            total,
            f"{advice}, or set data.bad_rows=skip (evaluate: --bad-rows skip) to leave them out.",
        )


def _hold_out(parts: Sequence[_Part], config: DataConfig, seed: int) -> tuple[list[_Part], list[_Part]]:
    """Split by row: a row's examples stay together. At least one row is held out of two or more, and one is kept.

    Where examples have a ``prompt_key``, all rows of a prompt stay together. Then so many prompts are held out that their rows
    are as many as asked for, or fewer; one prompt at least. Raises DataError when all rows have one prompt.
    """
    draws = [_draw(part.built.entry, seed, index) for index, part in enumerate(parts)]
    ranked = np.concatenate(
        [draw[_first_of_row(part)] for part, draw in zip(parts, draws)]
    )  # one draw for each row
    ranked.sort()
    if config.eval.fraction == 0 or len(ranked) < 2:
        return list(parts), []
    count = int(np.clip(np.searchsorted(ranked, config.eval.fraction), 1, len(ranked) - 1))
    values, sizes = np.unique(ranked, return_counts=True)
    if len(values) < 2:
        raise DataError(
            f"all {len(ranked)} rows have the same prompt, so no rows of another prompt can be held out.\n"
            "  Set data.eval.fraction=0, or name a file to evaluate on: data.eval.path."
        )
    whole = int(np.searchsorted(np.cumsum(sizes), min(count, config.eval.limit or count), side="right"))
    edge = values[int(np.clip(whole, 1, len(values) - 1)) - 1]
    train = [_Part(part.built, part.opened, part.chosen[draw > edge]) for part, draw in zip(parts, draws)]
    held = [_Part(part.built, part.opened, part.chosen[draw <= edge]) for part, draw in zip(parts, draws)]
    return train, held


def _draw(entry: Entry, seed: int, source: int) -> np.ndarray:
    """float64[examples]: equal for the examples of a row, or of a prompt; those below the fraction are held out."""
    keys = entry.values.get("prompt_key")
    return held_out(entry.row, seed, source) if keys is None else held_out_together(keys, seed)


def _check_lengths(parts: Sequence[_Part], limit: int, window: int | None) -> None:
    found = []
    total = tokens = 0
    for part in parts:
        lengths = part.built.entry.length[part.chosen]
        tokens += int(lengths.sum())
        for index in part.chosen[lengths > limit]:
            found.append((part, int(index)))
            total += int(part.built.entry.length[index])
    if not found:
        return
    lines = [
        f"  {part.opened.source.label}:{part.built.entry.row[index]}: {part.built.entry.length[index]} tokens"
        for part, index in found[:10]
    ]
    lines += [f"  ... and {len(found) - 10} more"] if len(found) > 10 else []
    needed = max(int(part.built.entry.length[index]) for part, index in found)
    fits = window is None or needed <= window
    advice = f"Set train.max_length={needed}" if fits else f"The model's window is {window}: shorten the rows"
    raise DataError(
        "\n".join([
            f"{len(found)} rows are longer than max_length {limit}; they hold {total / tokens:.1%} of all tokens:", *lines,
            f"{advice}, or choose another objective.overlong, such as drop or truncate.",
        ])
    )  # fmt: skip


def _split(
    parts: Sequence[_Part], objective: Any, limit: int, name: str, allowed: float
) -> tuple[Encoded, SplitReport]:
    """Fit the examples of a split to the length, drop those with nothing to learn, and count."""
    policy = objective.traits.overlong
    fitted = [fit(part.built.entry, part.chosen, policy, limit) for part in parts]
    empty = [view.targets == 0 for view in fitted]
    total, unlearnable = sum(map(len, fitted)), int(sum(mask.sum() for mask in empty))
    first = [
        f"{part.opened.source.label}:{part.built.entry.row[view.example[position]]}"
        for part, view, mask in zip(parts, fitted, empty)
        for position in np.flatnonzero(mask)[:10]
    ][:10]
    if total == 0 or unlearnable == total or unlearnable > allowed * total:
        examples = sum(len(part.chosen) for part in parts)
        if objective.traits.fits_rows:  # its rows without examples were too long
            examples, limit = (
                sum(part.built.entry.info["kept"] for part in parts),
                objective.max_length or limit,
            )
        raise _nothing(name, total, unlearnable, first, limit, examples)
    views = [view.keep(~mask) if mask.any() else view for view, mask in zip(fitted, empty)]
    encoded = join(
        [part.built.entry for part in parts], [part.opened.source.label for part in parts],
        [part.opened.source.weight for part in parts], views, [part.built.scratch for part in parts],
    )  # fmt: skip
    lengths = np.concatenate([part.built.entry.length[part.chosen] for part in parts])
    return encoded, SplitReport(
        rows=sum(int(_first_of_row(part).sum()) for part in parts),
        examples=len(encoded),
        tokens=int(encoded.lengths.sum()),
        supervised_tokens=int(encoded.supervised.sum()),
        unlearnable=unlearnable,
        unlearnable_first=tuple(first),
        overlong=_own(parts, name, policy)
        if objective.traits.fits_rows
        else _overlong(lengths, parts, fitted, policy, limit),
        duplicates=_duplicates(parts),
        histogram=histogram(lengths),
    )


def _nothing(
    name: str, total: int, unlearnable: int, first: Sequence[str], limit: int, examples: int
) -> DataError:
    if total == 0 and examples == 0:
        return DataError(
            f"no {name} rows: the file has none that can be used. Type `tunesmith data lint FILE` for the reasons."
        )
    if total == 0:
        return DataError(
            f"no {name} rows are left: all {examples} are longer than max_length {limit}. Raise train.max_length."
        )
    places = "\n".join(f"  {place}" for place in first)
    return DataError(
        f"{unlearnable} of {total} {name} examples have nothing to learn (no supervised token within max_length {limit}):\n"
        f"{places}\n"
        "Raise train.max_length, look at `tunesmith data preview`, or raise data.max_unlearnable if this is meant."
    )


def _overlong(
    lengths: np.ndarray, parts: Sequence[_Part], fitted: Sequence[Views], policy: str, limit: int
) -> dict[str, Any]:
    over = lengths > limit
    kept = 0 if policy == "drop" else limit
    lost = 0 if policy in ("split", "error") else int((lengths[over] - kept).sum())
    learnt = sum(int(part.built.entry.targets[part.chosen].sum()) for part in parts)
    lost_targets = learnt - sum(int(view.targets.sum()) for view in fitted)
    return {
        "policy": policy, "rows": int(over.sum()), "tokens": int(lengths[over].sum()), "tokens_lost": lost,
        "share_lost": lost / max(1, int(lengths.sum())), "supervised_lost": lost_targets,
    }  # fmt: skip


def _own(parts: Sequence[_Part], name: str, policy: str) -> dict[str, Any]:
    """Of an objective that fits its rows itself by ``policy``: what ``cut`` in its examples says, and how many rows it made
    nothing of (``dropped``; where rows are held out, the training split has them), whose tokens nobody counted."""
    cut = np.concatenate([part.built.entry.values["cut"][part.chosen] for part in parts])
    whole = [
        part.built.entry for part in parts if name == "training" or len(part.chosen) == len(part.built.entry)
    ]
    dropped = sum(entry.info["kept"] - len(np.unique(entry.row)) for entry in whole)
    tokens = sum(int(part.built.entry.length[part.chosen].sum()) for part in parts) + int(cut.sum())
    return {
        "policy": policy, "rows": int(np.count_nonzero(cut)) + dropped, "dropped": dropped, "tokens": tokens,
        "tokens_lost": int(cut.sum()), "share_lost": int(cut.sum()) / max(1, tokens), "supervised_lost": 0,
    }  # fmt: skip


def _duplicates(parts: Sequence[_Part]) -> int:
    digests = _row_digests(parts)
    return int(np.count_nonzero(digests[1:] == digests[:-1]))


def _shared(train: Sequence[_Part], held: Sequence[_Part]) -> int:
    """How many held-out rows say what a training row says."""
    learnt, asked = _row_digests(train), _row_digests(held)
    places = np.searchsorted(learnt, asked)
    inside = places < len(learnt)
    return int(np.count_nonzero(learnt[places[inside]] == asked[inside]))


def _row_digests(parts: Sequence[_Part]) -> np.ndarray:
    """One digest for each row, sorted (a row may have several examples, which stand together; a pair that became two rows has
    two)."""
    found = []
    for part in parts:
        digests, first = part.built.entry.digest[part.chosen], _first_of_row(part)
        first[1:] |= digests[1:] != digests[:-1]
        found.append(digests[first])
    return np.sort(np.concatenate(found))


def _first_of_row(part: _Part) -> np.ndarray:
    """bool[n]: which of the chosen examples are the first of their row. Examples of one row stand together."""
    rows = part.built.entry.row[part.chosen]
    first = np.ones(len(rows), np.bool_)
    np.not_equal(rows[1:], rows[:-1], out=first[1:])
    return first


def _source_report(built: Built, opened: OpenedSource, role: str, seconds: float) -> SourceReport:
    info = built.entry.info
    return SourceReport(
        path=opened.source.label,
        role=role,
        sha256=built.sha256,
        format=opened.description,
        rows_read=info["read"],
        rows_kept=info["kept"],
        rows_rejected=info["read"] - info["kept"],
        problems=tuple(
            str(RowProblem(**{**problem, "path": opened.source.label})) for problem in info["problems"]
        ),
        left_out=info["left_out"],
        weight=opened.source.weight,
        cached=built.cached,
        seconds=seconds,
        revision=hub_set.commit_of(hub_set.store_folder(opened.source)) if opened.source.hub else None,
    )
