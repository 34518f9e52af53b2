"""muP: the initialisation and rates of tensors relative to a base shape.

With the base shape's rates and initialisation, a model of another shape has by role (n: inputs of
a matrix over those of the base, m: hidden over the base's, d: layers over the base's; Yang et al.,
arXiv 2203.03466, table 8, for Adam; Dey et al., CompleteP, arXiv 2505.01618, for depth):

                                std or value     rate        AdamW's eps      Muon's rate
    readers of the stream       1 / sqrt(n)      1 / n       1 / (inner d)    1
    writers to it               1 / sqrt(n) d    1 / (n d)   1 / m            1 / d
    biases of readers           0                1           1 / (inner d)
    biases of writers           0                1 / d       1 / m
    norms of a block            1                1           1 / (m d)
    embeddings, untied head     1                1           1 / m
    the final norm              1 / m            1 / m       1

`inner`: outputs of the reader (heads or ffn) over the base's.  Weight decay is divided by the rate,
so that the decay per step is unchanged. eps is proportional to the gradient.

There are no multipliers in the forward pass: a multiplier c on a tensor is equivalent to c times
the tensor and c times its rate (both papers' "abc" symmetry, under Adam). So the model is a plain
one in every format. The head's 1 / m is in the final norm's gain, which a tied head needs and an
untied head may use as well; the residual branches' 1 / d is in their writers. Growth by copies
produces weights in this form (`megagrow.growth.operators.width`), and the `exact` state
policy's rates are the same as these.

Lion moves every element by its rate, as Adam does, so the table applies to it too. Muon's matrix
updates have a spectral norm of rate times sqrt(max(1, outputs / inputs)), proportional to the
spectral condition (Yang et al., arXiv 2310.17813) as long as matrices keep their aspect ratio; its
other tensors use AdamW.
"""

from __future__ import annotations

from typing import NamedTuple

from megagrow.config import ModelConfig
from megagrow.state.catalog import Rates


class Scale(NamedTuple):
    """Ratios of a model's sizes to those of its base shape; 1 without a base shape."""

    hidden: float = 1.0
    heads: float = 1.0
    ffn: float = 1.0
    layers: float = 1.0

    def reader(self, inner: float) -> Rates:
        """For a matrix that reads the stream; `inner`: the ratio of its outputs."""
        return Rates(1.0 / self.hidden, 1.0 / (inner * self.layers))

    def reader_bias(self, inner: float) -> Rates:
        """Of its bias."""
        return Rates(1.0, 1.0 / (inner * self.layers))

    def writer(self, inner: float) -> Rates:
        """For a matrix that writes to the stream; `inner`: the ratio of its inputs."""
        return Rates(1.0 / (inner * self.layers), 1.0 / self.hidden, 1.0 / self.layers)

    @property
    def writer_bias(self) -> Rates:
        """Of its bias."""
        return Rates(1.0 / self.layers, 1.0 / self.hidden)

    @property
    def norm(self) -> Rates:
        """For a norm inside a block."""
        return Rates(1.0, 1.0 / (self.hidden * self.layers))

    @property
    def table(self) -> Rates:
        """For embeddings and an untied head."""
        return Rates(1.0, 1.0 / self.hidden)

    @property
    def final_norm(self) -> Rates:
        """For the norm before the head."""
        return Rates(1.0 / self.hidden)


def scale_of(model: ModelConfig) -> Scale:
    """The ratios of a model to its base shape."""
    base = model.mup
    if base is None:
        return Scale()
    return Scale(
        hidden=model.hidden / base.hidden,
        heads=model.heads / (base.heads or model.heads),
        ffn=model.ffn / (base.ffn or model.ffn),
        layers=model.layers / (base.layers or model.layers),
    )
