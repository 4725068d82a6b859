#!/usr/bin/env python
"""Kill a run at 300 points of its work on the disk, resume it each time, and compare it with an undisturbed run, bit for bit.

    python benchmarks/kills.py --points 300 --out kills.json

Each point is an operation on the run folder: a file is opened, synced, renamed or removed, a folder is made or removed. The process
ends there by SIGKILL; in every fifth point the kernel ends it within a write, with half of a file on the disk. Then the run is
resumed. Tensors of the last checkpoint and of the model, metrics (all but the timing keys), samples and the names of all files
must be those of the undisturbed run. A tiny model is trained, so that a point takes a second.

The result counts the points: ``exact`` (resumed and equal), ``refused`` (nothing had begun: ``--resume`` says so, and the same
command without it is exact) and ``lost`` (anything else, with what differs). The exit code is 1 when something was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import kill_points


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the writes that are cut")
    parser.add_argument("--out", type=Path, help="also write the result to this file")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        result = kill_points.run(options.points, Path(name), options.seed, lambda line: print(line, file=sys.stderr))
    result["seconds"] = round(time.monotonic() - began, 1)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    return int(bool(result["lost"]))


if __name__ == "__main__":
    sys.exit(main())
