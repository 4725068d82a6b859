"""Finds the files of a split of a Hub data set, or streams its rows, as the ``datasets`` library defines
them.

A program for a separate process, like ``hub.client``: ``python -P -m tunesmith.hub.splits plan|rows REPO
REVISION NAME SPLIT``. Splits (folders, file names, the card's list) are a convention of that library, so only
the library is asked. It runs no code of a data set (it has no loading scripts since version 4), and its
caches are in a temporary folder.

``plan`` prints one JSON object. ``rows`` prints ``[row]`` on each line, then ``{"rows": count}`` at the end
of the split or at the limit; a stream without that last line broke off.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import fields
from datetime import date, time
from typing import TYPE_CHECKING, TypedDict

from tunesmith.hub.client import REFUSED, HubFile, info, print_reason, refusal
from tunesmith.suggestions import did_you_mean

if TYPE_CHECKING:
    from datasets import DatasetBuilder

_WHERE = {"name", "version", "data_dir", "data_files", "description", "features"}
"""Settings of a configuration that locate its rows, as opposed to how they are read."""


class UnknownSplit(Exception):
    """A configuration or split that the data set does not have. The message lists the valid ones."""


class Plan(TypedDict):
    """The commit and the ordered files of a split. ``kind``: the builder of ``datasets`` ("json", "parquet",
    ...). ``settings``: how the data set's card changes the builder's defaults: {"sep": ";"}."""

    revision: str
    files: dict[str, HubFile]
    kind: str
    settings: dict[str, str]


def plan(repo: str, revision: str | None, name: str | None, split: str) -> Plan:
    """Find the files of a split. Raises UnknownSplit."""
    listed = info("dataset", repo, revision)
    commit = listed["revision"]
    builder = _builder(repo, commit, name, split)
    start = f"hf://datasets/{repo}@{commit}/"
    paths = [str(path) for path in builder.config.data_files[split]]
    elsewhere = [path for path in paths if not path.startswith(start)]
    if elsewhere:
        raise UnknownSplit(
            f"the split {split!r} of {repo} has rows outside the data set, in {elsewhere[0]}; these are not read"
        )
    config, defaults = vars(builder.config), vars(type(builder.config)())
    keys = [field.name for field in fields(builder.config) if field.name not in _WHERE]
    return {
        "revision": commit,
        "files": {file: listed["files"][file] for file in (path.removeprefix(start) for path in paths)},
        "kind": type(builder).__module__.rpartition(".")[2],
        "settings": {key: repr(config[key]) for key in keys if config[key] != defaults[key]},
    }


def _builder(repo: str, commit: str, name: str | None, split: str) -> DatasetBuilder:
    """The builder of the configuration ``name``, which must have the split. Raises UnknownSplit."""
    from datasets import get_dataset_config_names, load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        names = get_dataset_config_names(repo, revision=commit)
        if name is not None and name not in names:
            raise UnknownSplit(f"{repo} has no configuration {name!r}. {did_you_mean(name, names)}")
        builder = load_dataset_builder(repo, name, revision=commit)
    except ValueError as error:
        if "Config name is missing" not in str(error):
            raise
        raise UnknownSplit(
            f"{repo} has several configurations; choose one with `name`. Valid: {', '.join(names)}"
        ) from None
    except (DatasetsError, FileNotFoundError, RuntimeError) as error:  # no file of a known type, or a script
        raise UnknownSplit(f"{repo} has no rows that can be read: {str(error).splitlines()[0]}") from None
    splits = [str(key) for key in builder.config.data_files or ()]
    if split not in splits:
        raise UnknownSplit(f"{repo} has no split {split!r}. {did_you_mean(split, splits)}")
    return builder


def print_rows(repo: str, commit: str, name: str | None, split: str, limit: int | None) -> None:
    """Print at most ``limit`` rows of a split, without storing its files.

    Images and audio are not decoded. Times become ISO text; other values that JSON lacks become null."""
    from datasets import load_dataset

    stream = load_dataset(repo, name, split=split, revision=commit, streaming=True)
    if stream.features:
        stream = stream.decode(False)
    number = 0
    for row in itertools.islice(stream, limit):
        print(json.dumps([row], default=_as_json))
        number += 1
    print(json.dumps({"rows": number}))


def _as_json(value: object) -> str | None:
    return value.isoformat() if isinstance(value, date | time) else None


def main(verb: str, repo: str, revision: str, name: str, split: str, limit: str = "") -> int:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if verb == "plan":
            print(json.dumps(plan(repo, revision or None, name or None, split)))
        else:
            print_rows(repo, revision, name or None, split, int(limit) if limit else None)
    except (UnknownSplit, HfHubHTTPError) as error:
        known = isinstance(error, UnknownSplit)
        print(
            json.dumps({"error": str(error) if known else refusal(error, "dataset", repo, revision or None)})
        )
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.excepthook = print_reason
    raise SystemExit(main(*sys.argv[1:]))
