"""What `nas synthesise` does: a data set drawn against a teacher and labelled by it, for searches without data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.commands_tables import Answer
from nas.errors import DataError, ExperimentError

if TYPE_CHECKING:
    from torch import Tensor

    from nas.space import TaskInfo


def add_parser(commands: Any, common: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the command to the subparsers ``commands``; it sets ``answer``, a function of the options."""
    command: argparse.ArgumentParser = commands.add_parser(
        "synthesise", parents=[common], help="images drawn against your trained model and labelled by it, as a data set"
    )
    command.add_argument("model", metavar="MODULE:BUILD", help="a function without arguments that makes your model")
    command.add_argument("--weights", metavar="FILE", help="its state, as safetensors")
    command.add_argument("--input", required=True, metavar="SHAPE", help="of one raw image, such as 1x28x28")
    command.add_argument("--classes", type=int, required=True, help="how many the model tells apart")
    command.add_argument("--source", default="gan", help="gan, vae, noise, data or module:name (default: %(default)s)")
    command.add_argument("--images", type=Path, metavar="FILE.npz", help="unlabelled images for vae and data: its x")
    command.add_argument("--n", type=int, default=5000, help="how many images to draw (default: %(default)s)")
    command.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="data set to write")
    command.add_argument("--range", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="smallest and largest raw value (default: 0 1)")  # fmt: skip
    command.add_argument("--mean", type=float, nargs="+", help="of the raw values, one or one a channel; for noise")
    command.add_argument("--std", type=float, nargs="+", help="their deviation (default of both: that of even values)")
    command.add_argument("--rounds", type=int, default=600, help="of the gan's training (default: %(default)s)")
    command.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE",
        help="an option of the source, such as adversarial=0 or steps=2000")  # fmt: skip
    command.add_argument("--seed", type=int, default=0, help="decides the images (default: %(default)s)")
    command.set_defaults(answer=synthesise)
    return command


def synthesise(options: argparse.Namespace) -> Answer:
    """Draw, label, write.

    Raises:
        DataError: a class never occurs, and whatever :func:`nas.datafree.synthesise` raises.
    """
    import numpy as np
    import torch

    from nas import datafree
    from nas.evaluators.train import predict
    from nas.experiment import apply_overrides
    from nas.student.own import built, with_weights
    from nas.student.package import write_samples

    info, settings = _info(options), dict[str, Any]()
    apply_overrides(settings, options.settings)
    torch.set_num_threads(1)
    recipe = datafree.Recipe(rounds=options.rounds)
    images = None if options.images is None else read_images(options.images)
    teacher = built(options.model)
    if options.weights is not None:
        teacher = with_weights(teacher, options.weights, options.model)
    x = datafree.synthesise(
        options.source, teacher, info, options.n, options.seed, settings, images=images, recipe=recipe
    )
    logits = predict(teacher, x)
    y = logits.argmax(axis=1)
    counts = np.bincount(y, minlength=info.classes)
    if not counts.all():
        missing = ", ".join(str(i) for i in np.flatnonzero(counts == 0)[:10])
        raise DataError(
            f"The model sees no image of class {missing} in the {len(x)} that were drawn.",
            expected="every class at least once",
            remedy="more images, more --rounds, or --set balance=10",
        )
    write_samples(options.out, x, torch.from_numpy(y))
    sure = torch.from_numpy(logits).softmax(dim=1).amax(dim=1).mean().item()
    return Answer(
        [
            f"{len(x)} images of {options.input} from {options.source} written to {options.out}",
            f"images a class, by the model: {counts.min()} to {counts.max()}; it is {100 * sure:.1f} % sure on average",
            f"search with them: task.data={options.out}; its accuracies are agreement with the model",
        ]
    )


def _info(options: argparse.Namespace) -> TaskInfo:
    from nas.profiling import parse_shape
    from nas.space import TaskInfo

    low, high = options.range
    if options.classes < 2:
        raise ExperimentError(f"--classes {options.classes}.", expected="at least 2")
    mean, std = options.mean or [(low + high) / 2], options.std or [(high - low) / 12**0.5]
    return TaskInfo(parse_shape(options.input), options.classes, tuple(mean), tuple(std), (low, high))


def read_images(path: Path) -> Tensor:
    """``x`` (or ``x_train``) of an ``.npz`` file as ``[n, channels, height, width]`` float32; nothing else is read.

    Raises:
        DataError: the file cannot be read, or holds no such array.
    """
    import torch

    from nas.tasks.checks import as_float32, as_images
    from nas.tasks.readers import npz_arrays

    def images(found: list[str]) -> list[str]:
        names: list[str] = [name for name in ("x", "x_train") if name in found]
        if not names:
            raise DataError(f"{path} holds {', '.join(found) or 'nothing'}.", expected="images as x or x_train")
        return names[:1]

    (x,) = npz_arrays(str(path), images, "images as x or x_train").values()
    return torch.from_numpy(as_float32(as_images(x, str(path)), str(path)))
