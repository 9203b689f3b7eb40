"""What `nas ablate` does; the command line prints it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.ablation import ARMS, TARGETS

if TYPE_CHECKING:
    from rich.table import Table

    from nas.ablation.spec import Ablation
    from nas.progress import Progress


def add_parser(commands: Any, common: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the command to the subparsers ``commands``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "ablate", parents=[common], help="joint search against one technique after the other, at equal training seconds"
    )
    parser.add_argument("experiment", help="file or bundled name; its latency budget is replaced by the targets")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of it")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N,…", help="default: %(default)s")
    parser.add_argument(
        "--targets", default=TARGETS, metavar="SHARE,…",
        help=f"of the teacher's p50, or milliseconds (default: {TARGETS.replace('%', '%%')})",
    )  # fmt: skip
    parser.add_argument("--arms", default=",".join(ARMS), metavar="ARM,…", help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, metavar="S",
        help="training seconds of an arm for a seed and target (default: what search.trials take the joint search)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder (default: runs/NAME-ablation)")
    parser.add_argument("--resume", action="store_true", help="go on where one stopped; more seeds may be asked for")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and how long it would take")
    return parser


def asked(options: argparse.Namespace) -> tuple[Ablation, Path]:
    """The ablation that the options mean, and its folder."""
    from nas.ablation.spec import load_ablation

    found = load_ablation(
        options.experiment, options.set, seeds=options.seeds, targets=options.targets, arms=options.arms,
        seconds=options.seconds,
    )  # fmt: skip
    return found, options.out or Path("runs") / f"{found.experiment.name}-ablation"


def forecast(ablation: Ablation) -> list[str]:
    """Lines about what would be done."""
    from nas.ablation.flow import forecast_ablation

    return forecast_ablation(ablation)


def run(ablation: Ablation, folder: Path, resume: bool, progress: Progress) -> None:
    """Do it."""
    from nas.ablation.flow import run_ablation

    run_ablation(ablation, folder, resume=resume, progress=progress)


def is_ablation(folder: Path) -> bool:
    """Whether a folder is one of an ablation."""
    return (folder / "ablation.yaml").exists()


def said(folder: Path, *, again: bool = False) -> tuple[Table, list[str]]:
    """The table and the sentences of a finished ablation; with ``again``, its page is written anew."""
    from nas.ablation.page import PAGE, ablation_table, headline, write_page
    from nas.ablation.result import read_result

    if again:
        write_page(folder)
    result = read_result(folder)
    return ablation_table(result), [*headline(result), f"report: {folder / PAGE}"]
