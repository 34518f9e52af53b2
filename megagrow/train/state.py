"""A run's state besides its tensors: a few numbers and the optimizer's rules."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megagrow.data.mixture import Mixture
from megagrow.data.position import Position
from megagrow.errors import GrowthError
from megagrow.forecast.mixing import Mixing
from megagrow.growth.new_blocks import retrained
from megagrow.growth.operators.ramp import Ramp
from megagrow.growth.optimizer_rules import OptimizerRules
from megagrow.growth.plan import Growth
from megagrow.schedule.end_rules import Seen
from megagrow.state.catalog import Catalog


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run started from.

    Attributes:
        path, format: where it was, and the name of its format.
        step: number of optimizer steps that it had.
        sha256: of its configuration, step and list of tensors.
        moments: whether its optimizer's moments were taken.
        history: the records of its own source and growths (`checkpoint/interface/history.py`).
    """

    path: str
    format: str
    step: int
    sha256: str
    moments: bool
    history: tuple[Mapping[str, Any], ...] = ()

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Origin:
        """Read what `dataclasses.asdict` gave (KeyError, TypeError or ValueError otherwise)."""
        return Origin(
            str(data["path"]),
            str(data["format"]),
            int(data["step"]),
            str(data["sha256"]),
            bool(data["moments"]),
            tuple(dict(record) for record in data.get("history", ())),
        )


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        step: number of optimizer steps done.
        position: samples taken from the data; the sampler's whole state.
        tokens, flops: consumed since the start of the run.
        growth_stage: index of the growth stage that the tensors belong to.
        optimizer_step: the optimizer's own count, which `reset` restarts.
        rules: what growths left to the optimizer.
        ramp: the last growth's ramp, while it lasts.
        loss_scale: state of fp16's dynamic loss scaling, else empty.
        recent: the last good losses, if the run looks for spikes (`recovery.spike`).
        ends: steps at which growth stages ended: the earlier ones, and this one as soon as
            its rule says so.
        seen: what the rule that ends this stage has seen.
        mixing: the record for the mixing time of growths, if that is measured.
        origin: the checkpoint that the run started from (`init.from`), if any.

    Random numbers need no state: those of a step depend only on the seed, the step and the rank.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    tokens: int = 0
    flops: int = 0
    growth_stage: int = 0
    optimizer_step: int = 0
    rules: OptimizerRules = field(default_factory=OptimizerRules)
    ramp: Ramp | None = None
    loss_scale: dict[str, float] = field(default_factory=dict)
    recent: tuple[float, ...] = ()
    ends: tuple[int, ...] = ()
    seen: Seen = field(default_factory=Seen)
    mixing: Mixing | None = None
    origin: Origin | None = None

    def with_mixing(self, mixing: Mixing) -> RunState:
        """The same state with another mixing record."""
        return replace(self, mixing=mixing)

    def after_step(
        self,
        *,
        samples: int,
        sequence: int,
        flops: int,
        applied: bool = True,
        mixture: Mixture | None = None,
    ) -> RunState:
        """The state one step later; the optimizer's count stays if no update was applied.

        Args:
            samples: number of samples in the step.
            sequence: tokens per sample.
            flops: of the step.
            applied: whether its update was applied.
            mixture: where the samples are from.
        """
        return replace(
            self,
            step=self.step + 1,
            optimizer_step=self.optimizer_step + applied,
            position=self.position.after(samples, sequence=sequence, mixture=mixture),
            tokens=self.tokens + samples * sequence,
            flops=self.flops + flops,
        )

    def after_growth(self, growth: Growth | None, *, betas: tuple[float, float] | None) -> RunState:
        """The state at the start of the next growth stage.

        Args:
            growth: into the stage; None if it has none.
            betas: AdamW's, if that is the optimizer.

        Raises:
            GrowthError: the ramp of an earlier growth is not finished, or its units are too young
                for this one's state policy.
        """
        if growth is not None and self.ramp is not None:
            raise GrowthError(
                f"step {self.step}: the units of the growth before are not all in yet",
                found=f"a mask of {self.ramp.progress(self.step):.3f}",
                fix=f"train to step {self.ramp.born + self.ramp.steps} before the next growth",
            )
        # A rule that ended the stage has already recorded its end.
        ended = len(self.ends) > self.growth_stage
        ends = self.ends if ended else (*self.ends, self.step)
        following = replace(self, growth_stage=self.growth_stage + 1, ends=ends, seen=Seen())
        return following if growth is None else following.grown(growth, betas=betas)

    def grown(self, growth: Growth, *, betas: tuple[float, float] | None) -> RunState:
        """The state after a growth in this stage, as at the start of a run (`after_growth`)."""
        count = 0 if growth.policy.restart_steps else self.optimizer_step
        rules = growth.rules_after(self.rules, step=count, betas=betas)
        ramp = None if growth.ramp is None else replace(growth.ramp, born=self.step)
        # A growth may raise the loss, which is then not a spike.
        return replace(self, optimizer_step=count, rules=rules, ramp=ramp, recent=())

    def retrained(self, before: Catalog, after: Catalog) -> RunState:
        """The state when a stage trains other tensors of the same model than the one before it."""
        rules = retrained(self.rules, before, after, step=self.optimizer_step)
        return replace(self, rules=rules)

    def to_json(self) -> dict[str, Any]:
        """A JSON-compatible form; `from_json` is its inverse."""
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        return {
            **numbers,
            **self.position.to_json(),
            "rules": self.rules.to_json(),
            "ramp": None if self.ramp is None else self.ramp.to_json(),
            "loss_scale": self.loss_scale,
            "recent": list(self.recent),
            "ends": list(self.ends),
            "seen": self.seen.to_json(),
            **({} if self.mixing is None else {"mixing": self.mixing.to_json()}),
            **({} if self.origin is None else {"origin": asdict(self.origin)}),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> RunState:
        """Read what `to_json` wrote (KeyError, TypeError or ValueError on anything else)."""
        numbers = {name: int(data[name]) for name in _NUMBERS}
        scale = {str(name): float(value) for name, value in data["loss_scale"].items()}
        rules = OptimizerRules.from_json(data["rules"])
        found = data.get("ramp")  # absent in runs older than ramps
        ramp = None if found is None else Ramp.from_json(found)
        recent = tuple(float(loss) for loss in data.get("recent", ()))
        # Runs older than stage rules have neither key: their plan gives the ends.
        ends = tuple(int(step) for step in data.get("ends", ()))
        seen = Seen.from_json(data["seen"]) if "seen" in data else Seen()
        mixing = Mixing.from_json(data["mixing"]) if "mixing" in data else None
        origin = Origin.from_json(data["origin"]) if "origin" in data else None
        return RunState(
            **numbers,
            position=Position.from_json(data),
            rules=rules,
            ramp=ramp,
            loss_scale=scale,
            recent=recent,
            ends=ends,
            seen=seen,
            mixing=mixing,
            origin=origin,
        )


_NUMBERS = ("step", "tokens", "flops", "growth_stage", "optimizer_step")


def step_seed(seed: int, *, step: int, data: int, pipe: int) -> int:
    """Seed of a step's random numbers (dropout): depends only on seed, step and position.

    Ranks of a tensor-parallel group get the same seed, as its layers require.

    Args:
        seed: the run's.
        step: number of optimizer steps done before it.
        data, pipe: the rank's data-parallel and pipeline coordinates.
    """
    text = f"{seed}/{step}/{data}/{pipe}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
