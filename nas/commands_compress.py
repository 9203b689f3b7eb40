"""What `nas compress` and `nas export` do: a record of steps, and any candidate in any format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.commands_tables import Answer, aligned

if TYPE_CHECKING:
    from nas.progress import Progress

TUNING = ("epochs", "final_epochs", "penalty_epochs", "lr", "batch_size", "weight_decay", "kd_weight", "temperature",
          "views")  # fmt: skip


def add_parsers(commands: Any, common: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """Add both commands to the subparsers ``commands``; each sets ``answer``, a function of options and progress."""
    compress = commands.add_parser(
        "compress", parents=[common], help="compress your own trained model step by step, and record what each step did"
    )
    compress.add_argument("model", metavar="MODULE:BUILD", help="a function without arguments that makes your model")
    compress.add_argument("--weights", type=Path, metavar="FILE", help="its state, as safetensors")
    compress.add_argument("--data", required=True, help="digits, an .npz file, a folder of images, or module:name")
    compress.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings_of_task",
        metavar="task.KEY=VALUE",
        help="a key of the task",
    )
    compress.add_argument(
        "--with", action="append", default=[], dest="steps", metavar="PASS[:KEY=VALUE,…]",
        help="a step: a pass and its options for the whole model; steps run in this order (see `nas list passes`)",
    )  # fmt: skip
    compress.add_argument(
        "--settings", type=Path, metavar="FILE", help="settings by layer, as YAML: pass → layer → setting"
    )
    compress.add_argument("--epochs", type=int, help="of fine-tuning after each step (default: 3)")
    compress.add_argument("--final-epochs", type=int, help="of fine-tuning after all steps (default: 0)")
    compress.add_argument("--penalty-epochs", type=int, help="before a pass that has a penalty (default: as --epochs)")
    compress.add_argument("--lr", type=float, help="learning rate (default: 0.001)")
    compress.add_argument("--batch-size", type=int, help="of the training (default: 64)")
    compress.add_argument("--weight-decay", type=float, help="of the training (default: 0.01)")
    compress.add_argument("--kd-weight", type=float, help="weight of what the original model says (default: 0.5)")
    compress.add_argument("--temperature", type=float, help="of that distillation (default: 4)")
    compress.add_argument("--views", type=int, help="augmented views of the training data (default: 1)")
    compress.add_argument("--seed", type=int, default=0, help="of splits and trainings (default: %(default)s)")
    compress.add_argument("--threads", type=int, default=1, help="of a measured inference (default: %(default)s)")
    compress.add_argument("--seconds", type=float, default=5.0, help="of measuring (default: %(default)s)")
    compress.add_argument("--out", type=Path, default=Path("runs/compressed"), help="folder (default: %(default)s)")
    compress.add_argument("--resume", action="store_true", help="go on after the last finished step")
    compress.set_defaults(answer=compress_model)

    export = commands.add_parser(
        "export", parents=[common], help="any candidate of a finished run as a student folder, in any format"
    )
    export.add_argument("run", type=Path, help="folder of a search or of `nas compress`, or a student folder")
    export.add_argument("--list", action="store_true", help="show what can be exported, with ids")
    export.add_argument(
        "--candidate", default="student", metavar="ID",
        help="student (default); a trial of the search, 17; a finalist, search-17 or uniform-3",
    )  # fmt: skip
    export.add_argument(
        "--format", action="append", default=[], metavar="NAME",
        help="onnx (default), pt2, openvino or executorch; may be given several times",
    )  # fmt: skip
    export.add_argument("--out", type=Path, metavar="DIR", help="the student folder to make")
    export.set_defaults(answer=export_candidate)
    return [compress, export]


def compress_model(options: argparse.Namespace, progress: Progress) -> Answer:
    """Run the pipeline; the record as a table."""
    from nas import api
    from nas.pipeline import Tuning, read_plan
    from nas.pipeline.record import read_record, sentences, table

    student = api.compress(
        options.model, options.data, options.steps, weights=options.weights,
        settings=read_plan(options.settings) if options.settings is not None else None,
        task=task_section(options.settings_of_task),
        tuning=Tuning(**{name: getattr(options, name) for name in TUNING if getattr(options, name) is not None}),
        seed=options.seed, threads=options.threads, seconds=options.seconds, out=options.out, resume=options.resume,
        progress=progress,
    )  # fmt: skip
    record = read_record(options.out)
    return Answer([*aligned(table(record)), "", *sentences(record), f"student: {student.folder}"])


def task_section(overrides: list[str]) -> dict[str, Any]:
    """What ``--set`` says of the task.

    Raises:
        ExperimentError: it says something else.
    """
    from nas.errors import ExperimentError
    from nas.experiment import apply_overrides

    raw: dict[str, Any] = {}
    apply_overrides(raw, overrides)
    section = raw.pop("task", {})
    if raw or not isinstance(section, dict):
        raise ExperimentError(f"--set {next(iter(raw), 'task')}=…", expected="task.KEY=VALUE")
    if "data" in section:
        raise ExperimentError("--set task.data=…", expected="the data in --data")
    return section


def export_candidate(options: argparse.Namespace, progress: Progress) -> Answer:
    """Export, or list what could be."""
    from nas.errors import ExperimentError
    from nas.exporting import candidates, export, note_of

    if options.list:
        return Answer(aligned(candidates(options.run)))
    if options.out is None:
        raise ExperimentError("nas export needs --out.", expected="--out DIR, or --list", remedy="--out exported")
    kinds = tuple(dict.fromkeys(options.format)) or ("onnx",)
    made = export(options.run, options.out, candidate=options.candidate, kinds=kinds, progress=progress)
    quality, latency = made.manifest["quality"], made.manifest["latency"][0]
    return Answer(
        [
            f"{made.name}: test {quality['metric']} {quality['student_onnx']:.4f} (teacher {quality['teacher']:.4f}), "
            f"p50 {latency['p50_ms']:.4f} ms (teacher {latency['teacher_p50_ms']:.4f}), "
            f"{made.manifest['size_bytes']['onnx']} bytes",
            *(note_of(name, facts) for name, facts in made.formats.items()),
            f"student: {made.folder}",
        ]
    )
