"""Which files of a data set of the Hub are which split, and its rows as a stream, as the ``datasets`` library has them.

A program in a process of its own, as ``hub.client`` is: ``python -P -m tunesmith.hub.splits plan|rows REPO REVISION NAME SPLIT``.
What a split is (folders, file names, the card's own list) is a convention of that library, and only it is asked. It runs no
code of a data set (it has no loading scripts since version 4), and its caches lie in a folder that is thrown away.

``plan`` prints one JSON object. ``rows`` prints ``[row]`` a line, then ``{"rows": how many}`` when the split, or the limit, is at
its end; a stream without that last line broke off.
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import fields
from datetime import date, time
from typing import Any

from tunesmith.hub.client import REFUSED, info, one_line, refusal
from tunesmith.suggestions import did_you_mean

_HOW_TO_FIND = {"name", "version", "data_dir", "data_files", "description", "features"}
"""Settings of a configuration that say where its rows are, not how to read them."""


class Unknown(Exception):
    """A configuration or a split that the data set does not have. The message lists those that it has."""


def plan(repo: str, revision: str | None, name: str | None, split: str) -> dict[str, Any]:
    """What is behind a split: "revision" (the commit), "files" in order, as ``client.info`` has them, "kind", "settings".

    ``kind``: how ``datasets`` reads it ("json", "parquet", ...). ``settings``: how its configuration changes that: {"sep": ";"}.
    """
    listed = info("dataset", repo, revision)
    commit = listed["revision"]
    builder = _builder(repo, commit, name, split)
    start = f"hf://datasets/{repo}@{commit}/"
    paths = [str(path) for path in builder.config.data_files[split]]
    elsewhere = [path for path in paths if not path.startswith(start)]
    if elsewhere:
        raise Unknown(
            f"the split {split!r} of {repo} has rows outside the data set, in {elsewhere[0]}; such a one is not read"
        )
    names = [path.removeprefix(start) for path in paths]
    plain = type(builder.config)()
    settings = {
        field.name: repr(getattr(builder.config, field.name))
        for field in fields(builder.config)
        if field.name not in _HOW_TO_FIND
        and getattr(builder.config, field.name) != getattr(plain, field.name)
    }
    kind = type(builder).__module__.rpartition(".")[2]
    return {
        "revision": commit,
        "files": {file: listed["files"][file] for file in names},
        "kind": kind,
        "settings": settings,
    }


def _builder(repo: str, commit: str, name: str | None, split: str) -> Any:
    """The builder of a configuration that has the split, or Unknown."""
    from datasets import get_dataset_config_names, load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        names = get_dataset_config_names(repo, revision=commit)
        if name is not None and name not in names:
            raise Unknown(f"{repo} has no configuration {name!r}. {did_you_mean(name, names)}")
        builder = load_dataset_builder(repo, name, revision=commit)
    except ValueError as error:
        if "Config name is missing" not in str(error):
            raise
        raise Unknown(
            f"{repo} has several configurations; say which with `name`. Valid: {', '.join(names)}"
        ) from None
    except (
        DatasetsError,
        FileNotFoundError,
        RuntimeError,
    ) as error:  # no file of a known kind; or a script, never run
        raise Unknown(f"{repo} has no rows that can be read: {str(error).splitlines()[0]}") from None
    found = [str(one) for one in builder.config.data_files or ()]
    if split not in found:
        raise Unknown(f"{repo} has no split {split!r}. {did_you_mean(split, found)}")
    return builder


def rows(repo: str, commit: str, name: str | None, split: str, limit: int | None) -> None:
    """Print the rows of a split, at most ``limit``, without a file of it on this disk.

    Pictures and sounds are not decoded; times are ISO text; what else has no place in JSON (bytes) is null.
    """
    from datasets import load_dataset

    stream = load_dataset(repo, name, split=split, revision=commit, streaming=True)
    if stream.features:
        stream = stream.decode(False)
    number = 0
    for row in itertools.islice(stream, limit):
        print(json.dumps([row], default=_as_json))
        number += 1
    print(json.dumps({"rows": number}))


def _as_json(value: Any) -> str | None:
    return value.isoformat() if isinstance(value, date | time) else None


def main(verb: str, repo: str, revision: str, name: str, split: str, limit: str = "") -> int:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if verb == "plan":
            print(json.dumps(plan(repo, revision or None, name or None, split)))
        else:
            rows(repo, revision, name or None, split, int(limit) if limit else None)
    except Unknown as error:
        print(json.dumps({"error": str(error)}))
        return REFUSED
    except HfHubHTTPError as error:
        print(json.dumps({"error": refusal(error, "dataset", repo, revision or None)}))
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.excepthook = one_line
    raise SystemExit(main(*sys.argv[1:]))
