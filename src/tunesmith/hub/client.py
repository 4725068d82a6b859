"""Asks the Hub what a repository holds, and downloads files of it, in a process of its own.

``hub.ask`` runs ``python -P -m tunesmith.hub.client info|download ...``, so that a connection that hangs can be ended, and so
that the process which trains or generates stays offline. A file that is not whole yet is called ``NAME.part``; the next download
into the same folder asks the Hub for the rest of it alone. The Hub's client has no such resume (since huggingface_hub 2 an
interrupted file is thrown away), but its ``http_get`` takes a file to go on with.

The last line on stdout is one JSON object; ``{"error": ...}`` where the Hub said no.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

REFUSED = 3
"""Exit code when the Hub answered and the answer was no."""

KINDS = {"model": "model", "dataset": "data set"}


def info(kind: str, repo: str, revision: str | None) -> dict[str, Any]:
    """The commit behind a revision, and all files it has.

    ``files``: name -> {"size": bytes, "sha256": of a large file, "sha1": git's name for a small one}, as the Hub has them.
    """
    from huggingface_hub import HfApi

    look_up = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
    found = look_up(repo, revision=revision, timeout=5, files_metadata=True)
    files = {}
    for file in found.siblings or []:
        sha256 = file.lfs.sha256 if file.lfs else None
        files[file.rfilename] = {
            "size": file.size,
            "sha256": sha256,
            "sha1": None if sha256 else file.blob_id,
        }
    return {"revision": found.sha, "files": files}


def download(kind: str, repo: str, revision: str, folder: Path, sizes: dict[str, int]) -> None:
    """Fetch the files of ``sizes`` (name -> bytes) into ``folder``; those that are there are left, half ones gone on with."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but not in its stubs

    for name, size in sizes.items():
        whole, part = folder / name, folder / f"{name}.part"
        if whole.is_file():
            continue
        part.parent.mkdir(parents=True, exist_ok=True)
        if part.is_file() and part.stat().st_size > size:
            part.unlink()
        with part.open("ab") as file:
            http_get(
                hf_hub_url(repo, name, repo_type=kind, revision=revision),
                file,
                resume_size=part.stat().st_size,
                headers=build_hf_headers(library_name="tunesmith"),
                expected_size=size,
                displayed_filename=name,
            )
        part.rename(whole)


def refusal(error: Exception, kind: str, repo: str, revision: str | None) -> str:
    """What the Hub's answer means, and what to do."""
    from huggingface_hub import errors

    at = f"{repo} at {revision}" if revision else repo
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo} is gated: its owner asks who takes it. Accept the terms on its page of the Hub, then set HF_TOKEN to a "
            "token of yours"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hub has {repo}, but not its revision {revision}: it was removed, or the name is wrong"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub has no {KINDS[kind]} {repo}, or it is private. Check the name; for a private one set HF_TOKEN"
    return f"the Hub could not give {at}: {str(error).strip().splitlines()[0]}"


def main(verb: str, kind: str, repo: str, revision: str, *rest: str) -> int:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        if verb == "info":
            print(json.dumps(info(kind, repo, revision or None)))
        else:
            download(kind, repo, revision, Path(rest[0]), json.load(sys.stdin))
    except HfHubHTTPError as error:
        print(json.dumps({"error": refusal(error, kind, repo, revision or None)}))
        return REFUSED
    return 0


def one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook: a line that went dead is no bug of ours, so the reason and no traceback."""
    print(f"{kind.__name__}: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.excepthook = one_line
    raise SystemExit(main(*sys.argv[1:]))
