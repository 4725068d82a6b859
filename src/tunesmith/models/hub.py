"""Downloads from the Hub, in a process of its own: the only place where tunesmith lets the Hub's client use the network.

``catalog.pull`` runs ``python -m tunesmith.models.hub info|download ...``, so that a connection that hangs can be ended, and
so that the process which trains or generates stays offline. An error ends this process; its last line is the reason.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

_KEPT = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Never pickles and never Python files; ``.txt`` and ``.model`` are vocabularies."""


def info(repo: str, revision: str | None) -> dict[str, object]:
    """The commit behind a revision, and the files worth having: top-level, in the formats kept."""
    from huggingface_hub import HfApi

    found = HfApi().model_info(repo, revision=revision, timeout=5)
    names = [sibling.rfilename for sibling in found.siblings or []]
    return {"revision": found.sha, "files": [name for name in names if "/" not in name and name.endswith(_KEPT)]}


def download(repo: str, revision: str, folder: str, files: list[str]) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(repo, revision=revision, allow_patterns=files, local_dir=folder)
    shutil.rmtree(Path(folder) / ".cache", ignore_errors=True)


if __name__ == "__main__":
    verb, repo, revision, *rest = sys.argv[1:]
    if verb == "info":
        print(json.dumps(info(repo, revision or None)))
    else:
        download(repo, revision, rest[0], rest[1:])
