"""NNI's published trials under ``nas sweep``, unchanged: what samplers and a pruner find in equally many trials.

    python benchmarks/nni_trial.py --data PATH/mnist.npz --seeds 0,1,2
    python benchmarks/nni_trial.py --example NNI/examples/trials/sklearn/classification --trials 30 --seeds 0,1,2

Without --example the trial is the one that NNI's package ships (``nnictl hello``: ``model.py``, with the search space
of its ``main.py``). It reads FashionMNIST by torchvision, which finds the first --images training images of --data and
a third as many test images in FashionMNIST's files, so nothing is downloaded. With --example it is a folder of NNI's
with a ``config.yml``. Every arm is one ``nas sweep --nni``; afterwards the trial's files are compared with the
published ones. --out keeps the sweeps, which are not repeated. Prints a line per sweep and a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ARMS: dict[str, list[str]] = {
    "TPE": ["--sampler", "TPESampler"],
    "random": ["--sampler", "RandomSampler"],
    "TPE, MedianPruner": ["--sampler", "TPESampler", "--pruner", "MedianPruner"],
}
HELLO = {
    "searchSpace": {
        "features": {"_type": "choice", "_value": [128, 256, 512, 1024]},
        "lr": {"_type": "loguniform", "_value": [0.0001, 0.1]},
        "momentum": {"_type": "uniform", "_value": [0, 1]},
    },
    "trialCommand": "python model.py",
}


def published(example: Path | None) -> Path:
    """The folder of the trial as NNI publishes it."""
    if example is not None:
        return example
    spec = find_spec("nni_assets")
    if spec is None or spec.origin is None:
        sys.exit("NNI is not installed: pip install 'latency-nas[nni]'")
    return Path(spec.origin).parent / "hello_hpo"


def write_idx(path: Path, data: npt.NDArray[np.uint8]) -> None:
    """The format of MNIST's files: a magic number, the sizes, the bytes."""
    head = np.array([0x0800 + data.ndim, *data.shape], dtype=">i4")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head.tobytes() + data.tobytes())


def prepare(folder: Path, source: Path, data: Path | None, images: int) -> Path:
    """A copy of the trial with its data beside it, and what ``--nni`` is given."""
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    if data is not None:
        with np.load(data, allow_pickle=False) as arrays:
            for kind, part, count in (("train", "train", images), ("t10k", "test", images // 3)):
                raw = folder / "data" / "FashionMNIST" / "raw"
                write_idx(raw / f"{kind}-images-idx3-ubyte", arrays[f"x_{part}"][:count].astype(np.uint8))
                write_idx(raw / f"{kind}-labels-idx1-ubyte", arrays[f"y_{part}"][:count].astype(np.uint8))
    config = folder / "config.yml"
    if not config.exists():
        config.write_text(json.dumps(HELLO))
    return config


def sweep(config: Path, out: Path, seed: int, arm: str, trials: int, workers: int) -> dict[str, Any]:
    """Run one; returns its result."""
    asked = ["sweep", "--nni", str(config), "--trials", str(trials), "--workers", str(workers), "--seed", str(seed)]
    asked += [*ARMS[arm], "--out", str(out)]
    if not (out / "sweep.json").exists():
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "-m", "nas", *asked, "--resume"], check=True, env=environment, stdout=subprocess.DEVNULL
        )
    result: dict[str, Any] = json.loads((out / "sweep.json").read_text())
    return {**result, "asked": "nas " + " ".join(asked)}


def changed(source: Path, copy: Path) -> list[str]:
    """Files of the published trial that are not byte by byte what they were."""
    files = [file for file in source.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return [str(file) for file in files if file.read_bytes() != (copy / file.relative_to(source)).read_bytes()]


def row(arm: str, results: list[dict[str, Any]]) -> str:
    """The table's line for one arm over the seeds."""
    best = [result["best"]["value"] for result in results]
    pruned = [sum(trial["status"] == "pruned" for trial in result["trials"]) for result in results]
    failed = sum(trial["status"] == "failed" for result in results for trial in result["trials"])
    seconds = [sum(trial["seconds"] for trial in result["trials"]) for result in results]
    spread = f" ± {statistics.stdev(best):.4f}" if len(best) > 1 else ""
    values = ", ".join(f"{value:.4f}" for value in best)
    return (
        f"| {arm} | {statistics.mean(best):.4f}{spread} | {values} | {statistics.mean(pruned):.1f} | {failed} "
        f"| {statistics.mean(seconds):.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--example", type=Path, help="a folder of NNI's examples (default: the one in its package)")
    parser.add_argument("--data", type=Path, help="mnist.npz, in the place of FashionMNIST")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=";".join(ARMS), help="separated by semicolons")
    parser.add_argument("--out", type=Path, default=Path("runs/nni-trial"))
    options = parser.parse_args()
    source, folder = published(options.example), (options.out / "trial").resolve()
    config = prepare(folder, source, options.data, options.images)
    lines = []
    for arm in options.arms.split(";"):
        results = []
        for seed in map(int, options.seeds.split(",")):
            out = options.out / f"{arm.replace(', ', '-')}-{seed}"
            results.append(sweep(config, out, seed, arm, options.trials, options.workers))
            print(json.dumps({"command": results[-1]["asked"], "best": results[-1]["best"]}), flush=True)
        lines.append(row(arm, results))
    if different := changed(source, folder):
        sys.exit(f"the trial was changed: {different}")
    print(f"\n{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; one thread a trial, "
          f"{options.workers} trials at a time; the trial's files are the published ones\n")  # fmt: skip
    print("| arm | best (mean ± standard deviation) | by seed | pruned of "
          f"{options.trials} | failed | seconds of all trials |\n|---|---|---|---|---|---|")  # fmt: skip
    print("\n".join(lines))


if __name__ == "__main__":
    main()
