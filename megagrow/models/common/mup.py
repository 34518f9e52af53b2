"""The maximal update parametrisation: how tensors of a shape start and learn, beside a base shape.

With the base shape's rates and initialisation, a model of another shape has by role (n: inputs of
a matrix over those of the base, m: hidden over the base's, d: layers over the base's; Yang et al.,
arXiv 2203.03466, table 8, for Adam; Dey et al., CompleteP, arXiv 2505.01618, for depth):

                                std or value     rate        AdamW's eps      Muon's rate
    readers of the stream       1 / sqrt(n)      1 / n       1 / (inner d)    1
    writers to it               1 / sqrt(n) d    1 / (n d)   1 / m            1 / d
    biases of readers           0                1           1 / (inner d)
    biases of writers           0                1 / d       1 / m
    norms of a block            1                1           1 / (m d)
    embeddings, an own head     1                1           1 / m
    the final norm              1 / m            1 / m       1

`inner`: outputs of the reader (heads or ffn) over the base's.  Weight decay is divided by the
rate, so that a step's decay stays.  eps is in proportion to the gradient.

There are no multipliers in the forward pass: one of c on a tensor is the same as the tensor times c
and its rate times c (both papers' "abc" symmetry, under Adam).  So a model is a plain one in every
format.  The head's 1 / m is in the final norm's gain, which a tied head cannot do without and an
own head may have as well; the residual branches' 1 / d is in what they write.  Weights that grow
by copies come out in this form (`growth.width`), and the `exact` state policy's rates are these.

Lion moves every element by its rate, as Adam does, so the table holds for it.  Muon's updates of a
matrix have a spectral norm that is the rate times sqrt(max(1, outputs / inputs)), in proportion
to what the spectral condition asks for (Yang et al., arXiv 2310.17813), as long as matrices keep
their aspect; its other tensors are AdamW's.
"""

from __future__ import annotations

from typing import NamedTuple

from megagrow.config import ModelConfig
from megagrow.state.catalog import Rates


class Scale(NamedTuple):
    """Sizes of a model over those of its base shape; 1 where none is given."""

    hidden: float = 1.0
    heads: float = 1.0
    ffn: float = 1.0
    layers: float = 1.0

    def reader(self, inner: float) -> Rates:
        """Of a matrix that reads the stream, `inner` the scale of its outputs."""
        return Rates(1.0 / self.hidden, 1.0 / (inner * self.layers))

    def reader_bias(self, inner: float) -> Rates:
        """Of its bias."""
        return Rates(1.0, 1.0 / (inner * self.layers))

    def writer(self, inner: float) -> Rates:
        """Of a matrix that writes to the stream, `inner` the scale of its inputs."""
        return Rates(1.0 / (inner * self.layers), 1.0 / self.hidden, 1.0 / self.layers)

    @property
    def writer_bias(self) -> Rates:
        """Of its bias."""
        return Rates(1.0 / self.layers, 1.0 / self.hidden)

    @property
    def norm(self) -> Rates:
        """Of a norm inside a block."""
        return Rates(1.0, 1.0 / (self.hidden * self.layers))

    @property
    def table(self) -> Rates:
        """Of embeddings, and of a head with a matrix of its own."""
        return Rates(1.0, 1.0 / self.hidden)

    @property
    def final_norm(self) -> Rates:
        """Of the norm before the head."""
        return Rates(1.0 / self.hidden)


def scale_of(model: ModelConfig) -> Scale:
    """How far a model is from the base shape that it names."""
    base = model.mup
    if base is None:
        return Scale()
    return Scale(
        hidden=model.hidden / base.hidden,
        heads=model.heads / (base.heads or model.heads),
        ffn=model.ffn / (base.ffn or model.ffn),
        layers=model.layers / (base.layers or model.layers),
    )
