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

    Bounds (`steps`, `tokens`, `flops`) count from the start of the run.  Rules watch the run:
    `slope` ends the stage when d log L / d log C of the validation loss rises above it; `marginal`
    when the larger model is predicted to reduce the loss more per FLOP; `planned` ends it where the
    planner says, computed before the run starts.
    """

    steps: Annotated[int, Field(ge=0)] | None = None  # 0: the next growth comes before any step
    tokens: Annotated[float, Field(gt=0)] | None = None
    flops: Annotated[float, Field(gt=0)] | None = None
    slope: Annotated[float, Field(lt=0)] | None = None
    marginal: Literal[True] | None = None
    planned: Literal[True] | None = None

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
    hidden: Positive | None = None
    heads: Positive | None = None
    kv_heads: Positive | None = None
    head_dim: Positive | None = None
    ffn: Positive | None = None
    vocab: Positive | None = None
    sequence: Positive | None = None


# The sizes of a model, by their keys in the section `model`.
SIZES: tuple[str, ...] = tuple(GrowTarget.__pydantic_fields__)


class GrowConfig(Section):
    """One growth: the operator, the factor or target, and the policy for optimizer state.

    `operator` is one name, or several joined by ``+`` that are applied in order in the same growth.
    The size is given by `factor` (for each of them; 2 by default) or by `target`. `state_policy:
    null` selects the operator's default. `rewarm` is the number of steps over which the learning
    rate warms up again after the growth; null selects the policy's default. `restart` sets the
    learning-rate schedule back: the position S of the growth becomes S / restart (Shen et al.,
    arXiv 2203.06211); `paper` selects their value for depth, width or both, whichever grows; null
    does not set it back. `mup: true` divides the learning rate of matrices by the growth of their
    inputs, and that of the final norm where it carries the output head's share.  `ramp` is the
    number of steps over which `width_random` unmasks its new units, `fit_steps` the number of steps
    for which `ligo` is fitted; null selects the operator's default.  `noise` is the standard
    deviation of the noise that `width_noise` and `width_perturb` (1 by default), `depth_stack`,
    `depth_interleave` and `depth_slices` (0) add to copies, in units of the copies' own root mean
    square; `shrink` what `shrink_pad_perturb` multiplies old weights by (0.4). `depth_slices` and
    `depth_identity` take `sources`, the old layer that each layer of the grown model is a copy of;
    `depth_slices` without it does not copy `keep_first` and `keep_last` layers at the ends, and
    stacks those between. `tokenizer` (of `vocab`) is the tokenizer from now on: a file, a dataset
    that was prepared with it, or a Hugging Face directory. Rows are carried by the texts of tokens,
    and new ones are means of the rows of their pieces; `old_tokenizer` is the one before, where the
    checkpoint does not hold its own; `allow_dropped: true` lets tokens get lost.  It is for runs
    that start from a checkpoint (`init.from`), in their first stage, and for `launch/grow.py`.
    """

    operator: str
    factor: Annotated[int, Field(ge=2, le=64)] | None = None
    target: GrowTarget | None = None
    state_policy: str | None = None
    rewarm: Annotated[int, Field(ge=0, le=10**12)] | None = None
    ramp: Positive | None = None
    fit_steps: Positive | None = None
    noise: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    shrink: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    sources: Annotated[list[Count], Field(min_length=1, max_length=4096)] | None = None
    keep_first: Count | None = None
    keep_last: Count | None = None
    tokenizer: PathText | None = None
    old_tokenizer: PathText | None = None
    allow_dropped: bool | None = None
    restart: (
        Annotated[
            Annotated[float, Field(ge=1.0), Tag(VALUE)] | Annotated[Literal["paper"], Tag(TEXT)],
            Discriminator(text_or_value),
        ]
        | None
    ) = None
    mup: bool = False

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
