"""The section `model` of a configuration file."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

from megagrow.config.families import ARCHITECTURES, Architecture
from megagrow.config.section import (
    SECTION,
    TEXT,
    VALUE,
    Layers,
    Positive,
    Section,
    section_or_value,
    text_or_value,
)

Std = Annotated[float, Field(gt=0.0)]
Rate = Annotated[float, Field(gt=0.0)]
# GPT-2's std for everything (Radford et al., 2019), used by most models since.
PUBLISHED_STD = 0.02
# The std of an untied embedding.
EMBEDDING_STD = 0.5


class InitConfig(Section):
    """Standard deviations of initial parameters by their role in the model (docs/rates.md)."""

    embedding: Std | None = None
    """Of the token embedding; null: 0.5, or 0.02 if it is the head too, since logits scale."""
    position: Std | None = None
    """Of learned positions; null: as `embedding`."""
    head: Std | None = None
    """Of an untied output head; null: 0.02."""
    matrices: Annotated[
        Annotated[Std, Tag(VALUE)] | Annotated[Literal["fan_in"], Tag(TEXT)],
        Discriminator(text_or_value),
    ] = PUBLISHED_STD
    """Of the blocks' matrices, or `fan_in`: 1 / sqrt(inputs) of each (LeCun et al., "Efficient
    BackProp", 1998). Those that write to the residual stream have it / sqrt(2 * layers)."""


class Stds(NamedTuple):
    """The same with all defaults filled in; `matrices` is None for ``fan_in``."""

    embedding: float
    position: float
    head: float
    matrices: float | None


class LayerKind(NamedTuple):
    """What makes one layer of a model differ from another with the same tensors.

    Attributes:
        window: number of tokens that a token attends to, itself included; None for all.
        rotary: whether positions are rotary; False if there are none in attention.
    """

    window: int | None
    rotary: bool


# Settings of the `model` section that only some families have.
_FAMILY_SETTINGS = (
    "rope_scaling", "rope_fraction", "no_rope_every", "window", "full_every",
    "attention_scale", "attention_softcap", "logit_softcap", "head_norm_eps",
)  # fmt: skip


class MupConfig(Section):
    """The base shape of the maximal update parametrisation (muP), at which rates are as configured.

    For a model of another shape, the initialisation and the rates of its tensors are scaled by the
    ratio of its sizes to these, so that settings tuned at the base shape stay optimal
    (docs/rates.md).
    """

    hidden: Positive
    """Width of the base model."""
    heads: Rate | None = None
    """Its heads; null: in the ratio of `hidden` to the first model's. Growths do not change it."""
    ffn: Rate | None = None
    """Its ffn width; null: in the ratio of `hidden` to the first model's."""
    layers: Layers | None = None
    """Its layers; null: depth has no effect on initialisation and rates."""


class RopeScaling(Section):
    """Changed frequencies of rotary positions, for sequences longer than a model was trained on."""

    type: Literal["linear", "llama3"]
    """`linear` divides all frequencies by `factor` (Chen et al., arXiv 2306.15595); `llama3` only
    low ones (Llama 3.1, arXiv 2407.21783)."""
    factor: Annotated[float, Field(ge=1.0)]
    """What frequencies are divided by."""
    low_freq_factor: Annotated[float, Field(gt=0.0)] | None = None
    """Of llama3: a wavelength above original_sequence / this is divided by all of `factor`."""
    high_freq_factor: Annotated[float, Field(gt=0.0)] | None = None
    """Of llama3: one below original_sequence / this is kept; those between are interpolated."""
    original_sequence: Positive | None = None
    """Of llama3: the sequence length of the first training."""

    @model_validator(mode="after")
    def _as_the_type_needs(self) -> RopeScaling:
        keys = ("low_freq_factor", "high_freq_factor", "original_sequence")
        given = [key for key in keys if getattr(self, key) is not None]
        if self.type == "linear" and given:
            raise ValueError(f"{given[0]} is for type: llama3; leave it out")
        if self.type == "llama3":
            missing = [key for key in keys if key not in given]
            if missing:
                raise ValueError(f"type: llama3 needs {missing[0]}")
            if self.low_freq_factor >= self.high_freq_factor:  # type: ignore[operator]
                raise ValueError("low_freq_factor must be less than high_freq_factor")
        return self


class ModelConfig(Section):
    """The shape of a transformer. Some settings are for some families only (docs/families.md)."""

    model_config = ConfigDict(serialize_by_alias=True)

    family: str = "gpt2"
    """The model family: a name in docs/families.md."""
    layers: Layers
    """Number of layers."""
    hidden: Positive
    """Width of the residual stream."""
    heads: Positive
    """Number of query heads."""
    kv_heads: Positive | None = None
    """Number of key/value heads (grouped-query attention); null: `heads`."""
    head_dim_: Positive | None = Field(None, alias="head_dim")
    """Width of a head; null: hidden / heads."""
    ffn: Positive
    """Width of the MLP between its matrices."""
    sequence: Positive
    """Tokens of a sample."""
    vocab: Positive | None = None
    """Vocabulary size, without padding; null: the tokenizer's."""
    tie_embeddings: bool = True
    """The token embedding is the output head, too."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability of dropout after embedding, attention and MLP."""
    norm_eps: Annotated[float, Field(gt=0.0)] = 1e-5
    """Added to the mean square, or variance, in norms."""
    rope_theta: Annotated[float, Field(gt=0.0)] = 1e4
    """Base of rotary positions."""
    rope_scaling: RopeScaling | None = None
    """Changed frequencies of rotary positions; null: none."""
    rope_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of a head's features that rotary positions turn."""
    no_rope_every: Positive | None = None
    """k: layers k, 2k, ... (counted from 1) have no positions."""
    window: Positive | None = None
    """A token attends to itself and the `window` - 1 tokens before it; null: to all before it."""
    full_every: Positive | None = None
    """k: layers k, 2k, ... (counted from 1) attend without the window."""
    attention_scale: Annotated[float, Field(gt=0.0)] | None = None
    """Factor of attention scores; null: 1 / sqrt(head_dim)."""
    attention_softcap: Annotated[float, Field(gt=0.0)] | None = None
    """c: attention scores x become c tanh(x / c)."""
    logit_softcap: Annotated[float, Field(gt=0.0)] | None = None
    """c: logits x become c tanh(x / c)."""
    head_norm_eps: Annotated[float, Field(gt=0.0)] | None = None
    """`norm_eps` of the norms of queries and keys; null: `norm_eps`."""
    init_std: Annotated[
        Annotated[Std, Tag(VALUE)] | Annotated[InitConfig, Tag(SECTION)],
        Discriminator(section_or_value),
    ] = PUBLISHED_STD
    """Standard deviation of initial matrices and embeddings, or a section, by role."""
    mup: MupConfig | None = None
    """muP: initialisation and rates as functions of the shape (Yang et al., arXiv 2203.03466);
    null: off."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What is recomputed in the backward pass: nothing, the attention core, or the whole block."""
    compile: bool = False
    """Apply torch.compile to each block."""

    @field_validator("family")
    @classmethod
    def _a_known_family(cls, family: str) -> str:
        if family not in ARCHITECTURES:
            *names, last = map(repr, ARCHITECTURES)
            expected = f"{', '.join(names)} or {last}"
            raise PydanticKnownError("literal_error", {"expected": expected})
        return family

    @field_validator("mup")
    @classmethod
    def _a_whole_base_shape(cls, mup: MupConfig | None, info: ValidationInfo) -> MupConfig | None:
        sizes = {key: info.data[key] for key in ("hidden", "heads", "ffn") if key in info.data}
        if mup is None or len(sizes) < 3:  # missing keys are reported elsewhere
            return mup
        share = mup.hidden / sizes["hidden"]
        missing = {key: sizes[key] * share for key in ("heads", "ffn") if not getattr(mup, key)}
        return mup.model_copy(update=missing)

    @model_validator(mode="after")
    def _heads_divide_hidden(self) -> ModelConfig:
        if self.head_dim_ is None and self.hidden % self.heads:
            nearest = max(1, round(self.hidden / self.heads)) * self.heads
            raise ValueError(
                f"hidden = {self.hidden} is not divisible by heads = {self.heads}; "
                f"set model.hidden to a multiple of {self.heads}, for instance {nearest}, "
                "or set model.head_dim"
            )
        return self

    @model_validator(mode="after")
    def _kv_heads_divide_heads(self) -> ModelConfig:
        if self.heads % self.kv_groups:
            raise ValueError(
                f"heads = {self.heads} is not divisible by kv_heads = {self.kv_groups}; "
                f"set model.kv_heads to a divisor of {self.heads}"
            )
        return self

    @model_validator(mode="after")
    def _rotary_pairs(self) -> ModelConfig:
        if self.architecture.positions == "rotary" and self.rope_dim % 2:
            if self.rope_dim != self.head_dim:
                raise ValueError(
                    f"rope_fraction = {self.rope_fraction} of head_dim = {self.head_dim} is "
                    f"{self.rope_dim} features, but rotary positions turn pairs; set "
                    f"model.rope_fraction to {(self.rope_dim + 1) / self.head_dim}"
                )
            raise ValueError(
                f"head_dim = {self.head_dim} is odd, but rotary positions turn pairs of features; "
                f"set model.head_dim to an even number, for instance {self.head_dim + 1}"
            )
        return self

    @model_validator(mode="after")
    def _settings_of_the_family(self) -> ModelConfig:
        for key in _FAMILY_SETTINGS:
            unset = self.__class__.model_fields[key].default
            if getattr(self, key) != unset and key not in self.architecture.settings:
                having = [name for name, made in ARCHITECTURES.items() if key in made.settings]
                raise ValueError(
                    f"{key} = {getattr(self, key)} has no effect in family {self.family}; leave "
                    f"model.{key} out, or choose a family that has it: {', '.join(having)}"
                )
        unset = self.__class__.model_fields["rope_theta"].default
        if self.rope_theta != unset and self.architecture.positions != "rotary":
            raise ValueError(
                f"rope_theta = {self.rope_theta:g} has no effect in family {self.family}, which "
                "has no rotary positions; leave model.rope_theta out"
            )
        if self.full_every is not None and self.window is None:
            raise ValueError("full_every says which layers have no window; set model.window")
        return self

    @model_validator(mode="after")
    def _mup_knows_the_architecture(self) -> ModelConfig:
        made = self.architecture
        if self.mup is not None and (
            made.block_norms != "before" or made.head_norm or made.scaled_embedding
        ):
            raise ValueError(
                f"mup has no rule for norms after a sub-layer, norms of queries and keys, or "
                f"scaled embeddings, and family {self.family} has one of them; set model.mup: null"
            )
        return self

    @model_validator(mode="after")
    def _as_the_family_needs(self) -> ModelConfig:
        if self.architecture.check is not None:
            self.architecture.check(self)
        return self

    @model_validator(mode="after")
    def _a_tied_head_is_the_embedding(self) -> ModelConfig:
        by_role = isinstance(self.init_std, InitConfig)
        if by_role and self.init_std.head is not None and self.tie_embeddings:  # type: ignore[union-attr]
            raise ValueError(
                "init_std.head is for an untied head, but tie_embeddings = true: "
                "the head is the token embedding, whose std is init_std.embedding; leave "
                "model.init_std.head out, or set model.tie_embeddings=false"
            )
        return self

    @property
    def stds(self) -> Stds:
        """Standard deviations of initial parameters by role."""
        given = self.init_std
        if not isinstance(given, InitConfig):
            return Stds(given, given, given, given)
        embedding = given.embedding or (PUBLISHED_STD if self.tie_embeddings else EMBEDDING_STD)
        return Stds(
            embedding=embedding,
            position=given.position or embedding,
            head=given.head or PUBLISHED_STD,
            matrices=None if given.matrices == "fan_in" else given.matrices,
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_dim_ or self.hidden // self.heads

    @property
    def rope_dim(self) -> int:
        """Number of a head's features that rotary positions turn, its first ones."""
        return int(self.head_dim * self.rope_fraction)

    def layer_kind(self, layer: int) -> LayerKind:
        """What makes a layer, from 0, differ from others with the same tensors."""
        full = self.full_every is not None and (layer + 1) % self.full_every == 0
        turned = self.no_rope_every is None or (layer + 1) % self.no_rope_every != 0
        return LayerKind(
            window=None if full else self.window,
            rotary=turned and self.architecture.positions == "rotary",
        )

    @property
    def kv_groups(self) -> int:
        """Number of key/value heads, each shared by heads / kv_groups query heads."""
        return self.kv_heads or self.heads

    @property
    def architecture(self) -> Architecture:
        """The architectural properties of the model's family."""
        return ARCHITECTURES[self.family]

    @property
    def vocabulary(self) -> int:
        """The vocabulary size; raises ValueError if it is unset."""
        if self.vocab is None:
            raise ValueError("model.vocab is not set yet: it comes from the tokenizer")
        return self.vocab

    def effective(self, setting: str) -> Any:
        """The value of a setting, by its key in a file, with its default filled in."""
        return getattr(self, _FILLED_IN.get(setting, setting))


# Properties that fill in what a setting leaves open, where they have another name.
_FILLED_IN = {"kv_heads": "kv_groups", "vocab": "vocabulary"}
# The keys of the section.
MODEL_SETTINGS: tuple[str, ...] = tuple(
    field.alias or name for name, field in ModelConfig.__pydantic_fields__.items()
)
