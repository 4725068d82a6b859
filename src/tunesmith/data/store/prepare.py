"""The recipe's ``data:`` keys to examples: read, encode, hold out, fit to a length, report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.check import lint
from tunesmith.data.check.contamination import contamination
from tunesmith.data.data_config import DataConfig
from tunesmith.data.encode import turn_tokens
from tunesmith.data.encode.templates import apply_template
from tunesmith.data.read import class_folder, hub_set
from tunesmith.data.read.source import OpenedSource, eval_sources, open_source
from tunesmith.data.row_problems import RowProblem, bad_rows_error
from tunesmith.data.rows import Row
from tunesmith.data.store import hold_out
from tunesmith.data.store.cache import Entry, forget
from tunesmith.data.store.data_report import HeldOut, Report, SourceReport, SplitReport, histogram
from tunesmith.data.store.encode_source import Built, Objective, Progress, build, shared_key
from tunesmith.data.store.encoded_rows import Encoded, Views, fit, join
from tunesmith.errors import DataError, ReadOnceError
from tunesmith.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LISTED = 10  # rows that an error or a report names


@dataclass(frozen=True)
class Prepared:
    """Training and evaluation examples, the length that they fit in, and a report on every row.

    ``eval_sets``: the names of ``data.eval.sets``; example ``i`` of ``eval`` belongs to ``eval.source[i]``.
    ``kinds``: names of the row types of the training sources.
    """

    train: Encoded
    eval: Encoded | None
    max_length: int
    report: Report
    eval_sets: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """The examples ``chosen`` (indices) of a source that belong to one split.

    ``role``: "train", "eval", or "eval NAME" with a name of ``data.eval.sets``.
    """

    role: str
    opened: OpenedSource
    built: Built
    chosen: np.ndarray

    @property
    def entry(self) -> Entry:
        return self.built.entry

    @property
    def lengths(self) -> np.ndarray:
        return self.entry.length[self.chosen]

    def where(self, index: int) -> str:
        return f"{self.opened.source.label}:{self.entry.row[index]}"

    def problems(self) -> list[RowProblem]:
        return [RowProblem(**problem) for problem in self.entry.info["problems"]]

    def first_of_row(self) -> np.ndarray:
        """bool[n]: which examples are the first of their row. Examples of one row are neighbours."""
        rows = self.entry.row[self.chosen]
        first = np.ones(len(rows), np.bool_)
        np.not_equal(rows[1:], rows[:-1], out=first[1:])
        return first

    def groups(self) -> np.ndarray:
        """Return uint64[n]: the group of each example's row. A row takes the group of its first example."""
        groups, first = self.entry.group[self.chosen], self.first_of_row()
        forget(self.entry.group)
        return groups if first.all() else groups[first][np.cumsum(first) - 1]


def prepare(
    config: DataConfig,
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    window: int | None,
    seed: int,
    on_progress: Progress | None = None,
) -> Prepared:
    """Encode all sources (or find them in the cache) and apply the recipe's policies.

    ``max_length``: tokens; None = the longest row, at most ``window`` (the model's own limit; None = no
    limit). The tokenizer gets its chat template if the rows are conversations or the recipe names one.

    Raises DataError for bad rows under ``bad_rows: error``, for too long rows under the policy ``error``,
    and when too many examples (``max_unlearnable``) have no supervised token. It lists rows as ``file:row``.
    """
    began = time.perf_counter()
    if max_length is not None and window is not None and max_length > window:
        raise DataError(
            f"max_length {max_length} is above the model's window of {window} tokens. Set train.max_length to at most {window}."
        )
    opened = _open_sources(config, objective.traits.rows)
    template = "none: the rows are plain text"
    rendered = any(item.uses_template(tokenizer) for _, item in opened)
    if config.template is not None or config.template_kwargs or rendered:
        tokenizer, template = apply_template(tokenizer, config.template, config.template_kwargs)
    turn_tokens.set_policy(tokenizer, config.special_tokens)
    _scan(objective, [item for role, item in opened if role == "train"])
    key = shared_key(objective, tokenizer)
    parts = []
    for role, item in opened:
        built = build(item, objective, tokenizer, config.cache, key, on_progress)
        parts.append(_Part(role, item, built, np.arange(len(built.entry), dtype=np.int32)))
    _check_rows(parts, config)
    train, held, chosen = _hold_out(parts, config, seed)
    limit = _limit(train + held, objective, max_length, window)
    split = partial(_split, objective=objective, limit=limit, allowed=config.max_unlearnable)
    train_data, train_report = split(train, "training")
    named = {part.role.removeprefix("eval "): part for part in held if config.eval.sets}
    sets = {name: split([part], f"data.eval.sets.{name}")[1] for name, part in named.items()}
    eval_data, eval_report = split(held, "evaluation") if held else (None, None)
    written = objective.traits.head == "lm"
    shared = contamination(train_data, eval_data, tokenizer, written=written) if eval_data else None
    most = (objective.max_length or train_data.longest) if objective.traits.fits_rows else limit
    report = Report(
        sources=tuple(map(_source_report, parts)),
        train=train_report,
        eval=eval_report,
        eval_sets=sets,
        held_out=chosen,
        template=template,
        max_length=most,
        duplicates_train_eval=_duplicates_across(train, held) if held else 0,
        contaminated=shared,
        cached=all(part.built.cached for part in parts),
        seconds=time.perf_counter() - began,
    )
    extended = eval_data and objective.extend(eval_data)
    kinds = {kind.__name__ for role, item in opened if role == "train" for kind in item.kinds}
    return Prepared(objective.extend(train_data), extended, most, report, tuple(sets), tuple(sorted(kinds)))


def _open_sources(config: DataConfig, accepted: tuple[type, ...]) -> list[tuple[str, OpenedSource]]:
    """Open all sources, each with its role (see :class:`_Part`). An error names the evaluation set."""
    opened = [("train", open_source(source, accepted)) for source in config.train]
    for name, source in eval_sources(config).items():
        try:
            held = replace(open_source(source, accepted), held_out=True)
            opened.append((f"eval {name}".strip(), held))
        except DataError as error:
            raise DataError(f"data.eval.{f'sets.{name}' if name else 'path'}: {error}") from None
    return opened


def _scan(objective: Objective, opened: Sequence[OpenedSource]) -> None:
    """Let the objective scan the training rows.

    Bad rows are reported when they are encoded, or here if the objective refuses the others.
    """
    first: list[RowProblem] = []
    bad = 0

    def rows() -> Iterator[Row]:
        nonlocal bad
        for item in opened:
            if item.source.streaming:
                raise ReadOnceError(
                    f"{item.source.label} is a stream, which is read once, but its labels must be known before that.\n"
                    "  Leave out streaming; or name the labels: objective.labels=[...], for classify objective.problem_type, too."
                )
            for found in item.rows():
                if isinstance(found, tuple):
                    yield found[1]
                else:
                    first.extend([found][: LISTED - len(first)])
                    bad += 1

    try:
        objective.scan(rows())
    except DataError as error:
        if not bad:
            raise
        raise bad_rows_error(first, bad, f"Without them {error}") from None


def _check_rows(parts: Sequence[_Part], config: DataConfig) -> None:
    """Refuse bad rows, unless they are to be skipped and the rest of each file could be read."""
    bad = [part for part in parts if part.entry.info["problems"]]
    problems: list[RowProblem] = []
    for part in bad:
        source = part.opened.source
        for problem in part.problems():
            path = class_folder.path_in_folder(source.path, problem.path) or source.label
            problems.append(replace(problem, path=path))
    total = sum(part.entry.info["read"] - part.entry.info["kept"] for part in parts)
    fatal = any(part.entry.info["fatal"] for part in parts)
    if fatal or (total and config.bad_rows == "error"):
        skip = "Correct them, or set data.bad_rows=skip (evaluate: --bad-rows skip) to leave them out."
        rest = "The rest of the file cannot be read, so nothing is skipped." if fatal else skip
        raise bad_rows_error(problems, total, f"{lint.advice([part.opened.source for part in bad])}{rest}")


def _hold_out(
    parts: Sequence[_Part], config: DataConfig, seed: int
) -> tuple[list[_Part], list[_Part], HeldOut | None]:
    """Split by role or, without evaluation sources, by groups of rows (see ``data.store.hold_out``).

    Raises DataError when all rows are one group.
    """
    held = [part for part in parts if part.role != "train"]
    if held:
        return [part for part in parts if part.role == "train"], held, None
    groups = np.concatenate([part.groups()[part.first_of_row()] for part in parts])
    keys, chosen = hold_out.split(groups, config.eval, seed)
    if chosen is None:
        return list(parts), [], None
    masks = [hold_out.among(part.groups(), keys) for part in parts]
    train = [replace(part, chosen=part.chosen[~mask]) for part, mask in zip(parts, masks)]
    held = [replace(part, chosen=part.chosen[mask]) for part, mask in zip(parts, masks)]
    return train, held, chosen


def _limit(parts: Sequence[_Part], objective: Objective, max_length: int | None, window: int | None) -> int:
    """The length that examples must fit, in tokens. Raises DataError under the policy ``error``."""
    longest = max(int(part.entry.length.max(initial=0)) for part in parts)
    if objective.traits.fits_rows:  # each response of an example fits, all of them together need not
        return max(2, longest)
    limit = max_length or max(2, min(longest, window or longest))
    if objective.traits.overlong == "error":
        _check_lengths(parts, limit, window)
    return limit


def _check_lengths(parts: Sequence[_Part], limit: int, window: int | None) -> None:
    found = [(part, int(index)) for part in parts for index in part.chosen[part.lengths > limit]]
    if not found:
        return
    lengths = [int(part.entry.length[index]) for part, index in found]
    share = sum(lengths) / sum(int(part.lengths.sum()) for part in parts)
    lines = [
        f"  {part.where(index)}: {length} tokens" for (part, index), length in zip(found[:LISTED], lengths)
    ]
    lines += [f"  ... and {len(found) - LISTED} more"] if len(found) > LISTED else []
    needed = max(lengths)
    fits = window is None or needed <= window
    advice = f"Set train.max_length={needed}" if fits else f"The model's window is {window}: shorten the rows"
    head = f"{len(found)} rows are longer than max_length {limit}; they hold {share:.1%} of all tokens:"
    advice += ", or choose another objective.overlong, such as drop or truncate."
    raise DataError("\n".join([head, *lines, advice]))


def _split(
    parts: Sequence[_Part], name: str, objective: Objective, limit: int, allowed: float
) -> tuple[Encoded, SplitReport]:
    """Fit the examples of a split to the length, drop those without supervised tokens, and count."""
    policy = objective.traits.overlong
    fitted = [fit(part.entry, part.chosen, policy, limit) for part in parts]
    if not any(map(len, fitted)):
        raise _no_rows(parts, objective, limit, name)
    unlearnable, first = _check_supervised(parts, fitted, limit, name, allowed)
    views = [view.keep(view.targets > 0) for view in fitted]
    sources = [(part.opened.source.label, part.opened.source.weight, part.built) for part in parts]
    encoded = join([(built.entry, label, weight, built.scratch) for label, weight, built in sources], views)
    lengths = np.concatenate([part.lengths for part in parts])
    digests = _row_digests(parts)
    overlong = _overlong(lengths, parts, fitted, policy, limit)
    if objective.traits.fits_rows:
        overlong = _cut_rows(parts, name, policy)
    return encoded, SplitReport(
        rows=sum(view.count_rows(part.entry) for part, view in zip(parts, views)),
        examples=len(encoded),
        tokens=int(encoded.lengths.sum()),
        supervised_tokens=int(encoded.supervised.sum()),
        unlearnable=unlearnable,
        unlearnable_first=tuple(first),
        overlong=overlong,
        duplicates=int(np.count_nonzero(digests[1:] == digests[:-1])),
        histogram=histogram(lengths),
    )


def _check_supervised(
    parts: Sequence[_Part], fitted: Sequence[Views], limit: int, name: str, allowed: float
) -> tuple[int, list[str]]:
    """Count the examples without supervised tokens, and name the first ones. Raises DataError for too
    many."""
    empty = [np.flatnonzero(view.targets == 0) for view in fitted]
    total, unlearnable = sum(map(len, fitted)), sum(map(len, empty))
    first = [
        part.where(view.example[index])
        for part, view, indices in zip(parts, fitted, empty)
        for index in indices[:LISTED]
    ][:LISTED]
    if unlearnable == total or unlearnable > allowed * total:
        lines = "".join(f"  {place}\n" for place in first)
        raise DataError(
            f"{unlearnable} of {total} {name} examples have nothing to learn (no supervised token within max_length {limit}):\n"
            f"{lines}Raise train.max_length, look at `tunesmith data preview`, or raise data.max_unlearnable if this is meant."
        )
    return unlearnable, first


def _no_rows(parts: Sequence[_Part], objective: Objective, limit: int, name: str) -> DataError:
    """The error for a split without examples: no row was usable, or all were too long."""
    examples = sum(len(part.chosen) for part in parts)
    if objective.traits.fits_rows:  # it dropped rows before they became examples
        examples, limit = sum(part.entry.info["kept"] for part in parts), objective.max_length or limit
    if examples:
        reason = f"are left: all {examples} are longer than max_length {limit}. Raise train.max_length."
        return DataError(f"no {name} rows {reason}")
    problems = [problem for part in parts for problem in part.problems()]
    reasons = (
        bad_rows_error(problems, len(problems), lint.advice([part.opened.source for part in parts]))
        if problems
        else "the file is empty."
    )
    return DataError(f"no {name} rows: the file has none that can be used: {reasons}")


def _overlong(
    lengths: np.ndarray, parts: Sequence[_Part], fitted: Sequence[Views], policy: str, limit: int
) -> JsonObject:
    """Counts of the examples above ``limit``, and of the tokens that the policy loses."""
    over = lengths > limit
    kept = 0 if policy == "drop" else limit
    lost = 0 if policy in ("split", "error") else int((lengths[over] - kept).sum())
    before = sum(int(part.entry.targets[part.chosen].sum()) for part in parts)
    return {
        "policy": policy, "rows": int(over.sum()), "tokens": int(lengths[over].sum()), "tokens_lost": lost,
        "share_lost": lost / max(1, int(lengths.sum())),
        "supervised_lost": before - sum(int(view.targets.sum()) for view in fitted),
    }  # fmt: skip


def _cut_rows(parts: Sequence[_Part], name: str, policy: str) -> JsonObject:
    """The same counts for an objective that applies the policy itself: ``cut`` counts the tokens lost.

    ``dropped``: rows without an example, whose tokens are not known. They are counted in the training split.
    """
    cut = np.concatenate([part.entry.values["cut"][part.chosen] for part in parts])
    whole = [part.entry for part in parts if name == "training" or len(part.chosen) == len(part.entry)]
    dropped = sum(entry.info["kept"] - len(np.unique(entry.row)) for entry in whole)
    lost = int(cut.sum())
    tokens = sum(int(part.lengths.sum()) for part in parts) + lost
    return {
        "policy": policy, "rows": int(np.count_nonzero(cut)) + dropped, "dropped": dropped, "tokens": tokens,
        "tokens_lost": lost, "share_lost": lost / max(1, tokens), "supervised_lost": 0,
    }  # fmt: skip


def _duplicates_across(train: Sequence[_Part], held: Sequence[_Part]) -> int:
    """Count the held-out rows that equal a training row."""
    known, asked = _row_digests(train), _row_digests(held)
    places = np.searchsorted(known, asked)
    inside = places < len(known)
    return int(np.count_nonzero(known[places[inside]] == asked[inside]))


def _row_digests(parts: Sequence[_Part]) -> np.ndarray:
    """One digest for each row, sorted; two for a pair that became two rows."""
    found = []
    for part in parts:
        digests, first = part.entry.digest[part.chosen], part.first_of_row()
        first[1:] |= digests[1:] != digests[:-1]
        found.append(digests[first])
    return np.sort(np.concatenate(found))


def _source_report(part: _Part) -> SourceReport:
    info, source = part.entry.info, part.opened.source
    return SourceReport(
        path=source.label,
        role=part.role,
        sha256=part.built.sha256,
        format=part.opened.description,
        rows_read=info["read"],
        rows_kept=info["kept"],
        rows_rejected=info["read"] - info["kept"],
        problems=tuple(str(replace(problem, path=source.label)) for problem in part.problems()),
        left_out=info["left_out"],
        carriage_returns=info["carriage_returns"],
        in_turns=info["in_turns"],
        weight=source.weight,
        cached=part.built.cached,
        seconds=part.built.seconds,
        revision=hub_set.commit_of(hub_set.store_folder(source)) if source.hub else None,
    )
