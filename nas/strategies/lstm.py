"""An autoregressive policy: an LSTM that reads the gene chosen last and has a softmax head for every choice."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nas.space import Genomes
from nas.strategies.base import Domain
from nas.strategies.policies import Policy

Array = npt.NDArray[np.float64]
SPREAD = 0.1  # initial weights are uniform in ±0.1, as in Zoph & Le (2017)


class Controller(nn.Module):
    """``[n, choices]`` genomes → logits ``[n, choices, most values]``, each gene's from the genes before it.

    The controller of Zoph & Le (2017, "Neural Architecture Search with Reinforcement Learning") and of ENAS (Pham et
    al. 2018). Heads start at 0, so that the first policy is uniform. Double precision, so that how many rows are
    computed together does not change what is drawn.

    Args:
        sizes: values per choice.
        hidden: units of the LSTM and of the embeddings.
        seed: of the initial weights.
    """

    def __init__(self, sizes: Genomes, hidden: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed % 2**63)
        most = int(sizes.max())
        # Made without memory at first: the ordinary constructor would draw from the global generator.
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True, dtype=torch.float64, device="meta").to_empty(device="cpu")
        self.start = nn.Parameter(torch.empty(hidden, dtype=torch.float64))
        self.embeddings = nn.Parameter(torch.empty(len(sizes), most, hidden, dtype=torch.float64))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -SPREAD, SPREAD, generator=generator)
        self.heads = nn.Parameter(torch.zeros(len(sizes), hidden, most, dtype=torch.float64))
        self.biases = nn.Parameter(torch.zeros(len(sizes), most, dtype=torch.float64))
        self.register_buffer("beyond", torch.arange(most) >= torch.from_numpy(sizes)[:, None])

    beyond: Tensor

    def forward(self, genomes: Tensor) -> Tensor:
        n, choices = genomes.shape
        before = self.embeddings[torch.arange(choices - 1), genomes[:, :-1]]
        inputs = torch.cat([self.start.expand(n, 1, -1), before], dim=1)
        states, _ = self.lstm(inputs)
        logits = torch.einsum("nch,chv->ncv", states, self.heads) + self.biases
        return logits.masked_fill(self.beyond, -torch.inf)

    def draw(self, uniform: Tensor, heat: float) -> Tensor:
        """Genomes ``[n, choices]`` by inversion of ``uniform [n, choices]``, logits divided by ``heat``."""
        inputs, state = self.start.expand(len(uniform), 1, -1), None
        genes = []
        for choice, size in enumerate((~self.beyond).sum(dim=1).tolist()):
            out, state = self.lstm(inputs, state)
            logits = out[:, 0] @ self.heads[choice, :, :size] + self.biases[choice, :size]
            cumulative = torch.softmax(logits / heat, dim=1).cumsum(dim=1)
            genes.append((uniform[:, choice, None] >= cumulative).sum(dim=1).clamp(max=size - 1))
            inputs = self.embeddings[choice, genes[-1]][:, None]
        return torch.stack(genes, dim=1)


class Lstm(Policy):
    """The :class:`Controller` as a policy, moved by Adam.

    Args:
        domain: the genes.
        lr: Adam's step.
        hidden: units.
        seed: of the initial weights.
    """

    def __init__(self, domain: Domain, lr: float, hidden: int, seed: int) -> None:
        self.controller = Controller(domain.cardinalities, hidden, seed)
        self.optimizer = torch.optim.Adam(self.controller.parameters(), lr=lr, maximize=True)

    def sample(self, uniform: Array, heat: float = 1.0) -> Genomes:
        with torch.no_grad():
            return np.asarray(self.controller.draw(torch.from_numpy(uniform), heat))

    def logs(self, genomes: Genomes) -> Array:
        with torch.no_grad():
            return np.asarray(_chosen(self._log_softmax(genomes), genomes))

    def objective(self, genomes: Genomes, weights: Array, entropy: float) -> Tensor:
        """What :meth:`ascend` climbs, with its graph."""
        log = self._log_softmax(genomes)
        known = log.masked_fill(self.controller.beyond, 0.0)
        spread = -(log.exp() * known).sum(dim=(1, 2)).mean()
        return (torch.from_numpy(weights) * _chosen(log, genomes)).sum() + entropy * spread

    def ascend(self, genomes: Genomes, weights: Array, entropy: float) -> None:
        self.optimizer.zero_grad()
        self.objective(genomes, weights, entropy).backward()
        self.optimizer.step()

    def _log_softmax(self, genomes: Genomes) -> Tensor:
        return torch.log_softmax(self.controller(torch.from_numpy(genomes)), dim=2)


def _chosen(log: Tensor, genomes: Genomes) -> Tensor:
    return log.gather(2, torch.from_numpy(genomes)[:, :, None])[:, :, 0]
