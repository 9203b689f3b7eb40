"""Images from a variational autoencoder of unlabelled images: the student never sees these themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.datafree.base import Source, finite, image_shape, sources
from nas.datafree.generator import Generator, doublings
from nas.errors import ExperimentError
from nas.space import TaskInfo


@sources.register("vae")
class Vae(Source):
    """Auto-Encoding Variational Bayes (Kingma & Welling 2014) on images alone; the teacher labels what it draws.

    Minimises −ELBO (equation 10, one sample of z, Bernoulli pixels): cross-entropy of the pixels, scaled to 0..1,
    plus KL(q(z|x) ‖ N(0, 1)).

    Args:
        teacher, info, seed, images: see :class:`~nas.datafree.base.Source`.
        steps: of training.
        batch_size, lr: of Adam.
        latent: length of z.
        width: channels at full size.
        reconstructions: share of the drawn images that are decoded near an image's own code, the rest are decoded from
            the prior N(0, 1).
        spread: how far from it, in deviations of q(z|x).

    Raises:
        ExperimentError: an option is out of range.
        DataError: the images do not fit.
        TrainingError: the loss is not finite.
    """

    needs_images = True

    def __init__(
        self,
        teacher: nn.Module,
        info: TaskInfo,
        seed: int,
        images: Tensor | None = None,
        *,
        steps: int = 1000,
        batch_size: int = 128,
        lr: float = 2e-3,
        latent: int = 16,
        width: int = 16,
        reconstructions: float = 0.5,
        spread: float = 1.0,
    ) -> None:
        super().__init__(teacher, info, seed, images)
        for name, value in (("steps", steps), ("batch_size", batch_size), ("lr", lr), ("latent", latent)):
            if not value > 0:
                raise ExperimentError(f"{name} is {value}.", expected="a number above 0")
        if not 0 <= reconstructions <= 1 or not spread >= 0:
            raise ExperimentError(
                f"reconstructions is {reconstructions} and spread {spread}.",
                expected="a share from 0 to 1, and deviations of 0 or more",
            )
        self.latent, self.batch_size, self.reconstructions, self.spread = latent, batch_size, reconstructions, spread
        shape, (low, high) = image_shape(info), info.value_range
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = Encoder(shape, latent, width)
            self.decoder = Generator(shape, info.value_range, latent, width)
        self.losses: list[float] = []
        self._fit(((self.images - low) / (high - low)).clamp(0, 1), steps, lr)

    def _fit(self, x: Tensor, steps: int, lr: float) -> None:
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        optimiser = torch.optim.Adam(parameters, lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, lr / 100)
        for _ in range(steps):
            batch = x[torch.randint(len(x), (self.batch_size,), generator=self.generator)]
            mean, log_variance = self.encoder(batch)
            z = mean + (log_variance / 2).exp() * self.normal(*mean.shape)
            pixels = F.binary_cross_entropy_with_logits(self.decoder.logits(z), batch, reduction="sum")
            divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum()
            loss = finite((pixels + divergence) / len(batch), "the VAE")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            self.losses.append(loss.item())
        with torch.no_grad():
            codes = [self.encoder(piece) for piece in x.split(512)]
        self.means = torch.cat([mean for mean, _ in codes])
        self.deviations = torch.cat([(log_variance / 2).exp() for _, log_variance in codes])

    @torch.no_grad()
    def batch(self, n: int) -> Tensor:
        count = -(-n // self.batch_size)
        return torch.cat([self.decoder(self._codes(self.batch_size)) for _ in range(count)])[:n]

    def _codes(self, n: int) -> Tensor:
        z = self.normal(n, self.latent)
        near = torch.rand(n, generator=self.generator) < self.reconstructions
        rows = torch.randint(len(self.means), (n,), generator=self.generator)
        return torch.where(near[:, None], self.means[rows] + self.spread * self.deviations[rows] * z, z)


class Encoder(nn.Module):
    """Images ``[n, channels, height, width]``, values 0..1 → mean and log variance of z, each ``[n, latent]``."""

    def __init__(self, shape: tuple[int, int, int], latent: int, width: int) -> None:
        super().__init__()
        channels, height, breadth = shape
        sizes = doublings((height, breadth))
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.LeakyReLU(0.2)]
        for _ in sizes[1:]:
            layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * width)]
            layers += [nn.LeakyReLU(0.2)]
            width *= 2
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.code = nn.Linear(width * sizes[0][0] * sizes[0][1], 2 * latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.code(self.body(x)).chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 20)
