"""`vocab`: more tokens, by id or by the texts of another tokenizer's tokens.

Without a tokenizer the old ids keep their rows and new ids get fresh ones.  With `grow.tokenizer`
the ids may be in any other order: a row goes where the token with the same text is, and the row of
a new token is the mean of the rows of the pieces into which the old tokenizer splits its text:

    E'[i] = E[j]                      if new token i and old token j have the same text
    E'[i] = 1/n sum_j E[piece_j]      if i is new, of n pieces

for the embedding, an untied head and whatever else has a row for each token.  The mean over pieces
is that of fast vocabulary transfer (Gee et al., EMNLP 2022, arXiv 2402.09977); Hewitt
("Initializing New Word Embeddings for Pretrained Language Models", 2021) takes the mean of all rows
instead, which says nothing of the token.  The logits of old tokens are unchanged on text that both
encode alike.  Rows without a token, with which models are padded, keep their values as long as
there are rows without a token in the grown model; further ones are fresh.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from megagrow.config import ModelConfig
from megagrow.errors import GrowthError
from megagrow.growth.operator import GrowthBlock, Operator, require_no_less, require_same, same
from megagrow.growth.operators.axes import MoreRows
from megagrow.state.catalog import Catalog, LogicalTensor
from megagrow.transfer.state_map import AxisMap, Fill

Run = tuple[int, int, int]  # first row of the grown tensor, first row of the old one, count


@dataclass(frozen=True)
class TokenMap:
    """Where each row of a grown vocabulary comes from.

    Attributes:
        rows: number of rows, before and after.
        carried: runs of rows that old tokens, and rows without a token, keep.
        sums: by new row, the old rows of its pieces and their weights, which add up to 1.
    """

    rows: tuple[int, int]
    carried: tuple[Run, ...]
    sums: Mapping[int, tuple[tuple[int, float], ...]]

    @staticmethod
    def of(
        rows: tuple[int, int],
        carried: Iterable[tuple[int, int]],
        pieces: Mapping[int, Sequence[int]],
    ) -> TokenMap:
        """The map for (new row, old row) of carried rows, and the pieces of new ones."""
        runs: list[Run] = []
        for new, old in sorted(carried):
            first, source, count = runs[-1] if runs else (-1, -1, 0)
            if (new, old) == (first + count, source + count):
                runs[-1] = (first, source, count + 1)
            else:
                runs.append((new, old, 1))
        sums = {}
        for new, parts in sorted(pieces.items()):
            counts = {part: parts.count(part) for part in parts}
            sums[new] = tuple((part, n / len(parts)) for part, n in counts.items())
        return TokenMap(rows, tuple(runs), sums)

    def by_term(self) -> list[list[tuple[int, int, float]]]:
        """The terms of all sums: (new row, old row, weight), the first term of each sum first."""
        terms: list[list[tuple[int, int, float]]] = []
        for new, parts in self.sums.items():
            for at, (old, weight) in enumerate(parts):
                if at == len(terms):
                    terms.append([])
                terms[at].append((new, old, weight))
        return terms


@dataclass(frozen=True, kw_only=True)
class MoreTokens(MoreRows):
    """More tokens.

    Attributes:
        tokenizer, old_tokenizer: paths of the tokenizer from now on, and of the one before; "" for
            the same one, whose ids stay.
        allow_dropped: whether tokens may get lost.
        tokens: the map between the two, which needs their files (`Growth.with_tokens`). A growth
            that is planned alone, as where it lies behind, has none.
    """

    tokenizer: str = ""
    old_tokenizer: str = ""
    allow_dropped: bool = False
    tokens: TokenMap | None = None

    @property
    def lacking(self) -> bool:
        """Whether its blocks are not known yet."""
        return bool(self.tokenizer) and self.tokens is None

    def target(self, model: ModelConfig, factor: int) -> ModelConfig:
        """The vocabulary times the factor, by id alone."""
        if self.tokenizer:
            raise GrowthError(
                "grow.target.vocab: it is not known how many tokens grow.tokenizer has",
                found=self.tokenizer,
                fix="give grow.target.vocab, which is at least that many",
            )
        return super().target(model, factor)

    def blocks(
        self, tensor: LogicalTensor, small: Catalog, target: Catalog
    ) -> tuple[GrowthBlock, ...]:
        """The rows of old tokens, and the means of those of pieces."""
        if self.tokens is None or self.axis not in tensor.axes:
            return super().blocks(tensor, small, target)
        old, at = small[tensor.name], tensor.axes.index(self.axis)
        for meaning, n, large in zip(tensor.axes, old.shape, tensor.shape, strict=True):
            check = require_no_less if meaning == self.axis else require_same
            check(tensor.name, meaning, n, large)
        if (old.shape[at], tensor.shape[at]) != self.tokens.rows:
            raise GrowthError(
                f"{tensor.name}: the tokenizers were compared for another model",
                found=f"{old.shape[at]} and {tensor.shape[at]} rows",
                expected="{} and {}".format(*self.tokens.rows),
            )

        def axes(new: int, source: int, count: int) -> tuple[AxisMap, ...]:
            rows = AxisMap(new, 1, source, 1, count)
            return tuple(rows if i == at else same(n) for i, n in enumerate(old.shape))

        runs = self.tokens.carried
        carried = [GrowthBlock(tensor.name, axes(*run), grad=self.grad) for run in runs]
        means = [
            GrowthBlock(
                tensor.name,
                axes(new, row, 1),
                weight,
                self.grad,
                new=True,
                term=term,
                share=weight,
            )
            for term, parts in enumerate(self.tokens.by_term())
            for new, row, weight in parts
        ]
        return (*carried, *means)

    def fill(self, tensor: LogicalTensor, small: Catalog, target: Catalog) -> Fill:
        """Rows without a source are initialised as at the start of a run."""
        return "zeros" if self.lacking else super().fill(tensor, small, target)


def with_tokens(operator: Operator, tokens: TokenMap) -> Operator:
    """The operator with the map of its tokens."""
    assert isinstance(operator, MoreTokens)
    return replace(operator, tokens=tokens)


VOCAB = MoreTokens(
    name="vocab",
    summary="new token rows: fresh, or with grow.tokenizer the mean of the rows of their pieces; "
    "the logits of the old tokens stay",
    keeps="old logits",
    breaker="no copies are made",
    source="the usual practice; Gee et al., arXiv 2402.09977 (mean of the pieces)",
    policies=("kept", "sparkling", "copy", "reset"),
    sizes=("vocab",),
    any_size=True,
    settings=("tokenizer", "old_tokenizer", "allow_dropped"),
    axis="vocab",
    grad=None,  # new tokens are part of every softmax
)
