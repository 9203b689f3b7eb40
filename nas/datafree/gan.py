"""Images from a generator that is trained against the teacher, and against what the student does not know yet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nas.datafree.base import Source, finite, image_shape, sources
from nas.datafree.generator import Generator
from nas.datafree.losses import Seen, Witness, activation_loss, balance_loss, disagreement, one_hot_loss
from nas.errors import ExperimentError
from nas.space import TaskInfo


@sources.register("gan")
class Gan(Source):
    """Data-Free Learning of Student Networks (DAFL; Chen et al. 2019, equation 6), with two more terms.

    loss = one_hot·L_oh + activation·L_a + balance·L_ie + batchnorm·R_feature + adversarial·(1 − JS)

    The first three are DAFL's; R_feature are DeepInversion's BatchNorm statistics (Yin et al. 2020, equation 4), the
    last is its competition with the student (equation 8; first in Fang et al. 2019).

    Args:
        teacher, info, seed, images: see :class:`~nas.datafree.base.Source`; images are not looked at.
        one_hot, activation, balance, adversarial: weights of the terms, 0 or more; 0 switches one off.
        batchnorm: the same; without a word 1 where the teacher has BatchNorm layers with statistics, else 0.
        latent: length of z.
        width: channels of the generator at full size.
        lr: of Adam.
        steps: of the generator in a round.
        batch_size: images in a step.

    Attributes:
        terms: value of every term in use at the last step.

    Raises:
        ExperimentError: an option is out of range, or BatchNorm statistics are asked of a teacher without.
        DataError: the inputs are no images.
    """

    learns = True

    def __init__(
        self,
        teacher: nn.Module,
        info: TaskInfo,
        seed: int,
        images: Tensor | None = None,
        *,
        one_hot: float = 1.0,
        activation: float = 0.1,
        balance: float = 5.0,
        batchnorm: float | None = None,
        adversarial: float = 1.0,
        latent: int = 64,
        width: int = 16,
        lr: float = 2e-3,
        steps: int = 1,
        batch_size: int = 128,
    ) -> None:
        super().__init__(teacher, info, seed, images)
        self.witness = Witness(self.teacher)
        if batchnorm and not self.witness.layers:
            raise ExperimentError(
                "The teacher has no BatchNorm layer with running statistics.",
                expected="one, for the term batchnorm",
                remedy="batchnorm: 0, or the teacher as it was before its BatchNorm was folded",
            )
        if batchnorm is None:
            batchnorm = 1.0 if self.witness.layers else 0.0
        self.weights = {
            "one_hot": one_hot, "activation": activation, "balance": balance, "batchnorm": batchnorm,
            "adversarial": adversarial,
        }  # fmt: skip
        _check(self.weights, latent=latent, width=width, steps=steps, batch_size=batch_size, lr=lr)
        self.latent, self.steps, self.batch_size = latent, steps, batch_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = Generator(image_shape(info), info.value_range, latent, width)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=lr, betas=(0.5, 0.999))
        self.terms: dict[str, float] = {}

    def improve(self, student: nn.Module) -> None:
        """Steps of the generator. The student's weights, statistics and mode stay as they are."""
        training = student.training
        student.eval()
        for _ in range(self.steps):
            x = self.model(self.normal(self.batch_size, self.latent))
            terms = self._terms(self.witness(x), x, student)
            loss = finite(sum((self.weights[k] * v for k, v in terms.items()), torch.zeros(())), "the generator")
            # Only the generator's gradients: those of the student belong to the student's optimiser.
            gradients = torch.autograd.grad(loss, list(self.model.parameters()))
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            self.optimiser.step()
            self.terms = {k: float(v.detach()) for k, v in terms.items()}
        student.train(training)

    def _terms(self, seen: Seen, x: Tensor, student: nn.Module) -> dict[str, Tensor]:
        asked = {name for name, weight in self.weights.items() if weight}
        terms: dict[str, Tensor] = {}
        if "one_hot" in asked:
            terms["one_hot"] = one_hot_loss(seen.logits)
        if "activation" in asked:
            terms["activation"] = activation_loss(seen.features)
        if "balance" in asked:
            terms["balance"] = balance_loss(seen.logits)
        if "batchnorm" in asked and seen.batchnorm is not None:
            terms["batchnorm"] = seen.batchnorm
        if "adversarial" in asked:
            terms["adversarial"] = 1 - disagreement(seen.logits, student(x))
        return terms

    @torch.no_grad()
    def batch(self, n: int) -> Tensor:
        # Always whole batches: BatchNorm in the generator sees what it sees in training.
        count = -(-n // self.batch_size)
        images = [self.model(self.normal(self.batch_size, self.latent)) for _ in range(count)]
        return torch.cat(images)[:n]


def _check(weights: dict[str, float], **sizes: float) -> None:
    for name, value in weights.items():
        if not 0 <= value < float("inf"):
            raise ExperimentError(f"{name} is {value}.", expected="a weight of 0 or more")
    if not any(weights.values()):
        raise ExperimentError("Every weight of the generator's loss is 0.", expected="at least one above 0")
    for name, value in sizes.items():
        if not value > 0:
            raise ExperimentError(f"{name} is {value}.", expected="a number above 0")
