"""Asks the Hub what a repository holds, and downloads files of it.

``hub.ask`` runs ``python -P -m tunesmith.hub.client info|download ...``, so that it can end a connection that
hangs, and so that the process which trains or generates stays offline. An incomplete file is called
``NAME.part``; the next download into the same folder requests only the rest of it. The Hub's client no longer
resumes (huggingface_hub 2 discards an interrupted file), but its ``http_get`` can append to a file.

The last line on stdout is one JSON object, ``{"error": ...}`` if the Hub refused, ``{"disk": error number}`` if the
disk did.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import TypedDict

from tunesmith import files

REFUSED = 3
"""Exit code if the Hub answered that it refuses, or if the disk accepts no more."""

KINDS = {"model": "model", "dataset": "data set"}


class HubFile(TypedDict):
    """A file as the Hub lists it: bytes; sha256 of a large file, or git's sha1 of a small one."""

    size: int
    sha256: str | None
    sha1: str | None


class Listing(TypedDict):
    """The commit behind a revision, and all its files by name."""

    revision: str
    files: dict[str, HubFile]


def info(kind: str, repo: str, revision: str | None) -> Listing:
    """List a revision of a repository."""
    from huggingface_hub import HfApi

    look_up = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
    answer = look_up(repo, revision=revision, timeout=5, files_metadata=True)
    files: dict[str, HubFile] = {}
    for file in answer.siblings or []:
        sha256 = file.lfs.sha256 if file.lfs else None
        files[file.rfilename] = {
            "size": file.size or 0,
            "sha256": sha256,
            "sha1": None if sha256 else file.blob_id,
        }
    return {"revision": answer.sha or "", "files": files}


def download(kind: str, repo: str, revision: str, folder: Path, sizes: dict[str, int]) -> None:
    """Download ``sizes`` (name -> bytes) into ``folder``: skip complete files, continue partial ones."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, but not in its stubs

    headers = build_hf_headers(library_name="tunesmith")
    for name, size in sizes.items():
        whole, part = folder / name, folder / f"{name}.part"
        if whole.is_file():
            continue
        part.parent.mkdir(parents=True, exist_ok=True)
        if part.is_file() and part.stat().st_size > size:
            part.unlink()
        url = hf_hub_url(repo, name, repo_type=kind, revision=revision)
        with part.open("ab") as file:
            start = part.stat().st_size
            http_get(
                url, file, resume_size=start, headers=headers, expected_size=size, displayed_filename=name
            )
        part.rename(whole)


def refusal(error: Exception, kind: str, repo: str, revision: str | None) -> str:
    """The message for a refusal of the Hub."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo} is gated: its owner decides who may download it. Accept the terms on its page of the Hub, then set HF_TOKEN "
            "to your token"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the Hub has {repo}, but not its revision {revision}: it was removed, or the name is wrong"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub has no {KINDS[kind]} {repo}, or it is private. Check the name; for a private one set HF_TOKEN"
    at = f"{repo} at {revision}" if revision else repo
    return f"the Hub could not send {at}: {str(error).strip().splitlines()[0]}"


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
    except OSError as error:
        if files.disk_error(error, repo) is None:
            raise
        print(json.dumps({"disk": error.errno}))
        return REFUSED
    return 0


def print_reason(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook without a traceback: a lost connection is no bug of tunesmith's."""
    print(f"{kind.__name__}: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.excepthook = print_reason
    raise SystemExit(main(*sys.argv[1:]))
