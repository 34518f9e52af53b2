"""The sections that describe how a growth stage ends and what a growth does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from megagrow.config.rules import BOUNDS, RULES
from megagrow.config.section import (
    TEXT,
    VALUE,
    Layers,
    PathText,
    Positive,
    Section,
    text_or_value,
)

Count = Annotated[int, Field(ge=0)]
# What a growth stage trains (`megagrow.growth.training`): the tensors that its growth adds, all, or
# those with these roles or names.
Trained = Annotated[
    Annotated[Literal["new", "all"], Tag(TEXT)]
    | Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]],
        Field(min_length=1, max_length=1000),
        Tag(VALUE),
    ],
    Discriminator(text_or_value),
]


class UntilConfig(Section):
    """The end of a growth stage: a bound, a rule, or a rule with a bound as its latest end.

    Bounds (`steps`, `tokens`, `flops`) count from the start of the run, over all its stages.
    """

    steps: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps; 0: the next growth comes before any step."""
    tokens: Annotated[float, Field(gt=0)] | None = None
    """Tokens trained on."""
    flops: Annotated[float, Field(gt=0)] | None = None
    """FLOPs spent, forward and backward, as docs/glossary.md counts them."""
    slope: Annotated[float, Field(lt=0)] | None = None
    """d log L / d log C of the validation loss; the paper's is -0.0575 (arXiv 2203.06211)."""
    marginal: Literal[True] | None = None
    """A fit that follows the run says that the larger model gains more loss for a FLOP."""
    planned: Literal[True] | None = None
    """The planner's moment, by `growth.law`, computed before the run starts."""

    @model_validator(mode="after")
    def _one_of_each(self) -> UntilConfig:
        bounds, rules = self._given(*BOUNDS), self._given(*RULES)
        if len(bounds) > 1 or len(rules) > 1 or not bounds + rules:
            raise ValueError(
                f"give exactly one of {', '.join(BOUNDS)}, or a rule ({', '.join(RULES)}) "
                "alone or with one of them as the latest end; "
                f"found {' and '.join(bounds + rules) or 'none'}"
            )
        if rules and not set(bounds) <= set(RULES[rules[0]].bounds):
            raise ValueError(
                f"{rules[0]} counts in {', '.join(RULES[rules[0]].bounds)}; "
                f"its latest end cannot be in {bounds[0]}"
            )
        return self

    def _given(self, *keys: str) -> list[str]:
        return [key for key in keys if getattr(self, key) is not None]

    @property
    def rule(self) -> str | None:
        """The name of the rule, if there is one."""
        return next(iter(self._given(*RULES)), None)

    @property
    def bounded(self) -> bool:
        """Whether it gives steps, tokens or FLOPs."""
        return bool(self._given(*BOUNDS))

    @property
    def watches(self) -> bool:
        """Whether a rule may end the stage after any validation."""
        return self.rule is not None and RULES[self.rule].watches

    @property
    def looks_ahead(self) -> bool:
        """Whether a rule asks about the growth that follows the stage."""
        return self.rule is not None and RULES[self.rule].looks_ahead


class GrowTarget(Section):
    """Sizes of the model after a growth; sizes that are not given do not change."""

    layers: Layers | None = None
    """Layers after the growth."""
    hidden: Positive | None = None
    """Width of the residual stream after the growth."""
    heads: Positive | None = None
    """Query heads after the growth."""
    kv_heads: Positive | None = None
    """Key/value heads after the growth."""
    head_dim: Positive | None = None
    """Width of a head after the growth."""
    ffn: Positive | None = None
    """Width of the MLP after the growth."""
    vocab: Positive | None = None
    """Vocabulary size after the growth."""
    sequence: Positive | None = None
    """Tokens of a sample after the growth."""


# The sizes of a model, by their keys in the section `model`.
SIZES: tuple[str, ...] = tuple(GrowTarget.__pydantic_fields__)


class GrowConfig(Section):
    """One growth: the operator, the factor or target, and the policy for optimizer state."""

    operator: str
    """The operator, or several joined by `+`, applied in order in the same growth."""
    factor: Annotated[int, Field(ge=2, le=64)] | None = None
    """What each operator multiplies its size by; null: 2, unless `target` is given."""
    target: GrowTarget | None = None
    """The sizes after the growth, in place of `factor`."""
    state_policy: str | None = None
    """How moments and rates are carried (docs/growth-operators.md); null: the operator's own."""
    rewarm: Annotated[int, Field(ge=0, le=10**12)] | None = None
    """Steps over which the rate warms up again after the growth; null: the policy's own."""
    ramp: Positive | None = None
    """Of `width_random`: steps over which new units are unmasked; null: the operator's own."""
    fit_steps: Positive | None = None
    """Of `ligo`: steps for which its maps are fitted; null: the operator's own."""
    noise: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    """Standard deviation of the noise added to copies, in units of their own root mean square;
    null: 1 for `width_noise` and `width_perturb`, 0 for copies of layers."""
    shrink: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Of `shrink_pad_perturb`: the factor of old weights; null: 0.4."""
    sources: Annotated[list[Count], Field(min_length=1, max_length=4096)] | None = None
    """Of `depth_slices` and `depth_identity`: for each layer of the grown model the old layer that
    it is a copy of."""
    keep_first: Count | None = None
    """Of `depth_slices`: first layers that are not copied; null: 0."""
    keep_last: Count | None = None
    """Of `depth_slices`: last layers that are not copied; null: 0."""
    tokenizer: PathText | None = None
    """Of `vocab`: the tokenizer from now on, as a file, a dataset prepared with it, or a Hugging
    Face directory, for a growth in the first stage of a run with `init.from` and for `megagrow
    grow`. Rows go by the texts of tokens; new ones are the mean of the rows of their pieces."""
    old_tokenizer: PathText | None = None
    """The tokenizer before, where the checkpoint does not hold its own."""
    allow_dropped: bool | None = None
    """Accept that tokens of the old tokenizer are not in the new one."""
    restart: (
        Annotated[
            Annotated[float, Field(ge=1.0), Tag(VALUE)] | Annotated[Literal["paper"], Tag(TEXT)],
            Discriminator(text_or_value),
        ]
        | None
    ) = None
    """Set the learning-rate schedule back, from the growth's position S to S / `restart`; `paper`:
    by the values of arXiv 2203.06211 for depth, width or both; null: go on."""
    mup: bool = False
    """Divide the learning rate of matrices by the growth of their inputs (docs/rates.md)."""

    @model_validator(mode="before")
    @classmethod
    def _twice_by_default(cls, data: Any) -> Any:
        sized = ("factor", "target", "tokenizer")
        if isinstance(data, dict) and all(data.get(key) is None for key in sized):
            return {**data, "factor": 2}
        return data

    @model_validator(mode="after")
    def _one_measure(self) -> GrowConfig:
        if self.target is not None and self.factor is not None:
            raise ValueError("give factor or target, not both")
        if self.tokenizer is None and (self.old_tokenizer or self.allow_dropped is not None):
            raise ValueError("old_tokenizer and allow_dropped go with tokenizer; give that too")
        if self.tokenizer is not None and self.factor is not None:
            raise ValueError("with tokenizer, sizes are those of target; leave factor out")
        if self.target is not None and not self.target.model_dump(exclude_none=True):
            raise ValueError("target names no size; name one, for instance target: {layers: 12}")
        return self

    @property
    def extent(self) -> str:
        """The size in words: ``x2``, or ``to hidden 512, layers 12``."""
        if self.target is None:
            return f"x{self.factor}" if self.factor else "to the tokens of its tokenizer"
        sizes = self.target.model_dump(exclude_none=True)
        return "to " + ", ".join(f"{key} {n}" for key, n in sizes.items())
