"""Results of finished runs, stored in a result file so that they count without the runs.

An end point is identified only by what its loss depends on: the name of its member's
directory (which holds a digest of all settings), the dataset, the steps of its decay, and the
averaging.  The location of its runs is not included, so results can move between machines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from megagrow.config.load import in_words
from megagrow.config.section import Section
from megagrow.errors import ConfigError
from megagrow.savings.config import VERSION, AboveZero
from megagrow.savings.results import Point

SECTION = "known"  # the section of a result
_SHOWN = 300  # characters shown of an error in a file
_Cost = Annotated[float, Field(ge=0)]
_Step = Annotated[int, Field(ge=0)]
Kind = Literal["validation", "training"]


@dataclass(frozen=True)
class Key:
    """Identifies an end point.

    Attributes:
        run: the variant or control and its member's directory, `NAME/DIRECTORY`.
        data: the start of the dataset's fingerprint, since another machine may have other data
            under the same path.
        start, end: steps of the decay.
        average: fraction of the decay over which weights are averaged.
    """

    run: str
    data: str
    start: int
    end: int
    average: float | None


@dataclass(frozen=True)
class EndPoint:
    """A finished branch, and the version of megagrow that trained it."""

    key: Key
    point: Point
    version: str


@dataclass(frozen=True)
class CurveKey:
    """Identifies a stable run's curve.

    Attributes:
        run, data: as in `Key`.
        kind: `validation`, or `training` (means over neighbouring steps).
        samples: per validation; None if as many as at the ends.
    """

    run: str
    data: str
    kind: Kind
    samples: int | None


@dataclass(frozen=True)
class StableCurve:
    """Losses along a stable run.

    Attributes:
        points: FLOPs and loss, ascending FLOPs.
        growths: FLOPs at which it grew.
    """

    key: CurveKey
    points: Sequence[tuple[float, float]]
    growths: Sequence[float]
    version: str

    @property
    def reach(self) -> float:
        """The FLOPs at its last point."""
        return self.points[-1][0] if self.points else 0.0


@dataclass(frozen=True)
class Known:
    """The contents of result files.

    Attributes:
        points, curves: by their keys.
        notes: remarks about the files, one line each.
    """

    points: Mapping[Key, EndPoint] = field(default_factory=dict)
    curves: Mapping[CurveKey, StableCurve] = field(default_factory=dict)
    notes: Sequence[str] = ()


class _PointEntry(Section):
    """An end point in a file; a null loss means that it diverged."""

    run: str
    data: str
    start: _Step
    end: _Step
    average: float | None
    version: str
    budget: AboveZero
    flops: AboveZero
    tokens: _Cost | None
    seconds: _Cost | None
    loss: AboveZero | None
    growth_seconds: _Cost
    growth_flops: _Cost
    last_loss: AboveZero | None

    def end_point(self) -> EndPoint:
        own = self.model_dump()
        point = Point(**{one.name: own[one.name] for one in fields(Point)} | {
            "tokens": math.nan if self.tokens is None else self.tokens,
            "seconds": math.nan if self.seconds is None else self.seconds,
            "loss": math.inf if self.loss is None else self.loss,
        })  # fmt: skip
        return EndPoint(Key(**{one.name: own[one.name] for one in fields(Key)}), point,
                        self.version)  # fmt: skip


class _CurveEntry(Section):
    """A stable run's curve in a file."""

    run: str
    data: str
    kind: Kind
    samples: int | None
    version: str
    flops: list[AboveZero]
    loss: list[AboveZero]
    growths: list[AboveZero]

    def curve(self) -> StableCurve:
        key = CurveKey(self.run, self.data, self.kind, self.samples)
        # strict: a curve whose lists differ in length is damaged
        pairs = list(zip(self.flops, self.loss, strict=True))
        return StableCurve(key, pairs, self.growths, self.version)


class _Entries(Section):
    points: list[_PointEntry]
    curves: list[_CurveEntry]


def plain_point(point: Point) -> dict[str, Any]:
    """A point in JSON form: a diverged run has no loss."""
    return {
        key: value if value is not None and math.isfinite(value) else None
        for key, value in asdict(point).items()
    }


def section(points: Iterable[EndPoint], curves: Iterable[StableCurve]) -> dict[str, Any]:
    """The section of a result, in a canonical order."""
    return {
        "points": [
            {**asdict(one.key), "version": one.version, **plain_point(one.point)}
            for one in sorted(points, key=lambda one: repr(one.key))
        ],
        "curves": [
            {
                **asdict(one.key),
                "version": one.version,
                "flops": [flops for flops, _ in one.points],
                "loss": [loss for _, loss in one.points],
                "growths": list(one.growths),
            }
            for one in sorted(curves, key=lambda one: repr(one.key))
        ],
    }


def read_known(result: Path | None, more: Sequence[Path]) -> Known:
    """Read result files; if two contain the same end point, the first one counts.

    Args:
        result: the file of `--json`, read if it exists.
        more: the files of `--known`, which must exist.

    Raises:
        ConfigError: a file is missing, damaged, or from another benchmark or version.
    """
    points: dict[Key, EndPoint] = {}
    curves: dict[CurveKey, StableCurve] = {}
    notes: list[str] = []
    wanted = [(path, "--known") for path in more]
    if result is not None and result.exists():
        wanted.insert(0, (result, "--json"))
    read: set[Path] = set()
    for path, option in wanted:
        if path.resolve() in read:
            continue
        read.add(path.resolve())
        entries = _entries(path, option)
        if entries is None:
            notes.append(f"{path}: an older result, without the section {SECTION!r}: "
                         "taken as knowing nothing")  # fmt: skip
            continue
        for point in entries[0]:
            first = points.setdefault(point.key, point)
            if first.point.loss != point.point.loss:
                notes.append(differs(first, point, f"the one of {path}"))
        for curve in entries[1]:
            if curve.reach > (curves[curve.key].reach if curve.key in curves else -1.0):
                curves[curve.key] = curve
    return Known(points, curves, tuple(notes))


def differs(counts: EndPoint, other: EndPoint, whose: str) -> str:
    """A note about an end point with two different results."""
    key = counts.key
    return (f"{key.run}, decay over steps {key.start} to {key.end}: loss {counts.point.loss:.6g} "
            f"counts, {whose} is {other.point.loss:.6g}")  # fmt: skip


def _entries(path: Path, option: str) -> tuple[list[EndPoint], list[StableCurve]] | None:
    """The entries of a file; None if it is older than the section."""
    fix = {
        "--json": "name another file with --json, or move this one away to start over",
        "--known": "name a file that savings --json wrote, or leave this --known out",
    }[option]
    expected = f"a result of the savings benchmark, version {VERSION}"
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{option} {path}: cannot be read", found=error.strerror,
                          expected=expected, fix=fix) from error  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{option} {path}: is damaged, or no result",
                          found=f"no JSON: {str(error)[:_SHOWN]}",
                          expected=expected, fix=fix) from error  # fmt: skip
    kind = found.get("benchmark") if isinstance(found, dict) else None
    if kind != "savings":
        what = "no benchmark's result" if kind is None else f"a result of {str(kind)[:40]!r}"
        raise ConfigError(
            f"{option} {path}: is not a result of this benchmark",
            found=what,
            expected=expected,
            fix=fix,
        )
    if found.get("version") != VERSION:
        raise ConfigError(f"{option} {path}: is from another version of the benchmark",
                          found=f"version {str(found.get('version', 1))[:40]}",
                          expected=expected, fix=fix)  # fmt: skip
    if SECTION not in found:
        return None
    try:
        read = _Entries.model_validate(found[SECTION])
        points = [one.end_point() for one in read.points]
        if len({one.key for one in points}) < len(points):
            raise ValueError("points: one is there twice")
        return points, [one.curve() for one in read.curves]
    except ValueError as error:  # includes ValidationError
        raise ConfigError(
            f"{option} {path}: its section {SECTION!r} is damaged",
            found=in_words(error)[:_SHOWN],
            expected="the section as savings --json wrote it",
            fix=fix,
        ) from error
