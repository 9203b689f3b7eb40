"""What `nas sweep` is asked for; the command line runs it and prints what came of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import ExperimentError

if TYPE_CHECKING:
    from nas.sweep.spec import Sweep

# Keys of the sweep that have an option of their own.
_KEYS = ("command", "direction", "metric", "trials", "workers", "sampler", "pruner", "seed")


def add_parser(commands: Any, common: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the command to the subparsers ``commands``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sweep", parents=[common], help="run an experiment or a command many times with some keys varied"
    )
    parser.add_argument("sweep", nargs="?", help="file or bundled name (see `nas list sweeps`), or:")
    parser.add_argument(
        "--nni", type=Path, metavar="FILE", help="what NNI's users have: search_space.json or config.yml"
    )
    parser.add_argument(
        "--command", metavar="TEXT", help="what each trial runs; {params} in it stands for --key value options"
    )
    parser.add_argument(
        "--goal", dest="direction", choices=["maximize", "minimize"], help="which way the metric is better"
    )
    parser.add_argument("--metric", metavar="NAME", help="what is optimised")
    parser.add_argument("--trials", type=int, metavar="N", help="trials in all")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no further trial after this much time")
    parser.add_argument("--workers", type=int, metavar="N", help="trials at a time")
    parser.add_argument("--sampler", metavar="NAME", help="any sampler of Optuna")
    parser.add_argument("--pruner", metavar="NAME", help="any pruner of Optuna, judging what trials report")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampler")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the sweep")
    parser.add_argument("--out", type=Path, help="sweep folder (default: runs/NAME)")
    parser.add_argument("--resume", action="store_true", help="go on with a sweep, or join one that is running")
    parser.add_argument("--dry-run", action="store_true", help="check everything, and say what would be done")
    return parser


def asked(options: argparse.Namespace) -> tuple[Sweep, Path, list[str]]:
    """The sweep that the options mean, its folder, and notes for whoever asked.

    Raises:
        NasError: a file or an option is wrong.
    """
    from nas.sweep.nni_config import load_nni
    from nas.sweep.parameter import text
    from nas.sweep.spec import load_sweep

    if (options.sweep is None) == (options.nni is None):
        raise ExperimentError(
            "A sweep file or --nni, one of the two is needed.",
            remedy="nas sweep digits, or nas sweep --nni search_space.json --command 'python train.py'",
        )
    source, notes = (options.sweep, []) if options.nni is None else load_nni(options.nni)
    given = {key: value for key in _KEYS if (value := getattr(options, key)) is not None}
    if options.minutes is not None:
        given["seconds"] = 60 * options.minutes
        if isinstance(source, dict):
            source.setdefault("trials", None)
    if isinstance(source, dict) and not {"command", "function"} & {*source, *given}:
        raise ExperimentError(f"{options.nni} does not say what a trial runs.", remedy="--command 'python train.py'")
    sweep = load_sweep(source, [*options.set, *(f"{key}={text(value)}" for key, value in given.items())])
    return sweep, options.out or Path("runs") / sweep.name, notes
