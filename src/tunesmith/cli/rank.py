"""One process of ``tunesmith launch``: the verb it was started for, with its errors noted for the launcher instead of shown."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tunesmith.train import process_watch


def run(folder: Path, rank: int) -> int:
    """Do what ``folder/job.json`` says and return the exit code. ``command`` there is what the user typed."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    sys.argv = job["command"]
    process_watch.start(folder, rank)

    from tunesmith.cli.main import main

    def note(error: BaseException, exit_code: int, as_json: bool = False) -> int:
        process_watch.write_note(folder, rank, error=error, exit_code=exit_code)
        return exit_code

    code = main(job["arguments"], note)
    if code == 0:
        process_watch.write_note(folder, rank, done=True)
        from tunesmith.train import distributed

        distributed.close()
    return code


if __name__ == "__main__":
    code = run(Path(sys.argv[1]), int(os.environ["RANK"]))

    from tunesmith.cli.main import leave

    leave(code)
