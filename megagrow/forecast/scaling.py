"""Scaling laws: the loss of a model of N parameters after S steps (or D tokens), and back.

One form covers the published laws:

    L(N, S) = E + (N_c / N)^a_N + (S_c / S)^a_S

`kaplan`: Kaplan et al., "Scaling Laws for Neural Language Models" (arXiv 2001.08361), eq. 1.6,
with the constants of Shen et al. ("Staged Training", arXiv 2203.06211; their notebooks): E = 0,
N without embeddings, S in steps at the critical batch size B_crit = B_* / L^(1/a_B), at which a run
takes twice the minimum number of steps, hence 2 S_c. `chinchilla`: Hoffmann et al. (arXiv
2203.15556), approach 3: N with embeddings, S in tokens. `epoch`: Besiroglu et al., "Chinchilla
Scaling: A Replication Attempt" (arXiv 2404.10102): a refit.

When to grow (the marginal rule): as long as the small model reduces the loss more per FLOP than the
large one would at the same loss, it is better to stay small.  At constant batch size, with x_i =
(S_c/S_i)^a_S, A_i = (N_c/N_i)^a_N, g = N_2/N_1 and r = g^(-a_S/(1 + a_S)), equal gain and equal
loss give

    S_1 / S_2 = g^(1/(1 + a_S))        L* = (A_1 - r A_2) / (1 - r)      (E is added to L*)

and the saving is (1 - r) of the compute that the large model needs to reach L*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import scipy

from megagrow.errors import ConfigError

Unit = Literal["steps", "tokens"]


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, S) = floor + (n_scale / N)^n_power + (s_scale / S)^s_power, in nats per token.

    Attributes:
        name: name of the law, for reports.
        floor: E, the irreducible loss.
        n_scale, n_power: N_c and a_N.
        s_scale, s_power: S_c and a_S.
        unit: what S counts.
        embeddings: whether N counts embeddings.
    """

    name: str
    floor: float
    n_scale: float
    n_power: float
    s_scale: float
    s_power: float
    unit: Unit
    embeddings: bool

    def capacity(self, n: float) -> float:
        """A(N): the loss above the floor of N parameters in the limit of infinite training."""
        return math.exp(self.n_power * math.log(self.n_scale / n))

    def limit(self, n: float) -> float:
        """The loss of N parameters in the limit of infinite training."""
        return self.floor + self.capacity(n)

    def loss(self, n: float, s: float) -> float:
        """The loss of N parameters after S steps or tokens."""
        return self.limit(n) + math.exp(self.s_power * math.log(self.s_scale / s))

    def duration(self, n: float, loss: float) -> float:
        """S: the steps or tokens that N parameters need to reach a loss; may be infinite."""
        rest = loss - self.limit(n)
        return self.s_scale * rest ** (-1 / self.s_power) if rest > 0 else math.inf

    def optimal_loss(self, n: float) -> float:
        """The loss at which N is the compute-optimal size (C proportional to N S)."""
        return self.limit(n) + self.n_power / self.s_power * self.capacity(n)


KAPLAN = ScalingLaw("kaplan", 0.0, 8.8e13, 0.076, 2 * 2.1e3, 0.76, "steps", embeddings=False)
CHINCHILLA = ScalingLaw(
    "chinchilla", 1.69, 406.4 ** (1 / 0.34), 0.34, 410.7 ** (1 / 0.28), 0.28, "tokens", True
)
EPOCH = ScalingLaw(
    "epoch", 1.817, 482.0 ** (1 / 0.348), 0.348, 2085.4 ** (1 / 0.366), 0.366, "tokens", True
)
PUBLISHED = {law.name: law for law in (KAPLAN, CHINCHILLA, EPOCH)}

# Kaplan et al.: the critical batch size in tokens is B_STAR / L^(1 / B_POWER).
B_STAR, B_POWER = 2.1e8, 0.21


def find_law(name: str) -> ScalingLaw:
    """A published law by name; raises ConfigError with the available names."""
    if name not in PUBLISHED:
        raise ConfigError(
            "--law: no such scaling law",
            found=name,
            expected=", ".join(PUBLISHED),
            fix="name one of these, or give runs to fit one to: --fit RUN_DIR ...",
        )
    return PUBLISHED[name]


def critical_batch(loss: float) -> float:
    """The critical batch size in tokens (Kaplan et al., eq. 1.4)."""
    return float(B_STAR * loss ** (-1 / B_POWER))


def compute_at_critical_batch(law: ScalingLaw, n: float, loss: float) -> float:
    """FLOPs to reach a loss at its critical batch size: 6 N B S (Kaplan et al., eq. 1.8)."""
    return 6 * n * critical_batch(loss) * law.duration(n, loss)


@dataclass(frozen=True)
class GrowthPoint:
    """When to grow from N_1 to N_2 parameters, by the marginal rule.

    Attributes:
        loss: L*, the loss at which to grow.
        ratio: S_1 / S_2, steps to L* of the small model over those of the large one.
        saving: fraction of the compute that the large model needs to its own compute-optimal loss.
        slope: d log L / d log C of the small model at L*.
    """

    loss: float
    ratio: float
    saving: float
    slope: float


def when_to_grow(law: ScalingLaw, small: float, large: float) -> GrowthPoint:
    """The closed form at constant batch size, with compute proportional to N S.

    Args:
        law: any law.
        small, large: parameters before and after, small < large.
    """
    g = large / small
    ratio = g ** (1 / (1 + law.s_power))
    r = g ** (-law.s_power / (1 + law.s_power))
    a_small, a_large = law.capacity(small), law.capacity(large)
    loss = law.floor + (a_small - r * a_large) / (1 - r)
    full = law.duration(large, law.optimal_loss(large))
    saving = (1 - r) * law.duration(large, loss) / full
    slope = -law.s_power * (loss - law.limit(small)) / loss
    return GrowthPoint(loss, ratio, saving, slope)


def when_to_grow_at_critical_batch(law: ScalingLaw, small: float, large: float) -> GrowthPoint:
    """The same with the batch at its critical size: solved numerically, no closed form."""

    def gain(n: float, loss: float) -> float:
        """-dC/dL: the marginal cost of reducing the loss."""
        compute = compute_at_critical_batch(law, n, loss)
        return compute * (1 / (B_POWER * loss) + 1 / (law.s_power * (loss - law.limit(n))))

    def difference(rest: float) -> float:
        loss = law.limit(small) + math.exp(rest)
        return math.log(gain(small, loss) / gain(large, loss))

    # Near its limit the small model gains nothing; far above it the large one costs more.
    low = math.log(1e-9 * law.capacity(small))
    rest = scipy.optimize.brentq(difference, low, math.log(1e3 * law.capacity(small)))
    loss = law.limit(small) + math.exp(rest)
    ratio = law.duration(small, loss) / law.duration(large, loss)
    costs = [compute_at_critical_batch(law, n, loss) for n in (small, large)]
    optimal = law.optimal_loss(large)
    saving = (costs[1] - costs[0]) / compute_at_critical_batch(law, large, optimal)
    slope = -1 / (1 / B_POWER + loss / (law.s_power * (loss - law.limit(small))))
    return GrowthPoint(loss, ratio, saving, slope)
