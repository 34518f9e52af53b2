"""The data of a run: its datasets, the mixture of each stage, and the samples from a position on.

A run draws from one mixture until a stage brings another, or until a source of it is over; from
there on samples are counted from 0 again. The position (`megagrow.data.position`) keeps each such
part, and from it follows how far each dataset has been read: no token is seen twice within a pass
over its dataset, whatever the mixtures, stages and sample lengths.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from megagrow.config import Config
from megagrow.config.data import DataConfig, StageDataConfig
from megagrow.data.dataset import PreparedData, open_dataset, verify
from megagrow.data.mixture import Mixture, parts_of
from megagrow.data.position import Position
from megagrow.data.run_checks import require_ends, require_same_tokenizer
from megagrow.data.sampler import Int64, SampleIndex, validation_samples
from megagrow.data.tokenizer import Tokenizer
from megagrow.errors import DataError
from megagrow.schedule.stages import stage_data, stage_documents


@dataclass(frozen=True)
class MixtureSource:
    """A dataset in a mixture.

    Attributes:
        name: the last part of its path, or all of it if that is not unique.
        data: the dataset.
        weight: its share, relative to the others'.
        epochs: the most passes over it; None for any number.
        drop: whether the other sources take its share after them; else the run stops.
    """

    name: str
    data: PreparedData
    weight: float = 1.0
    epochs: float | None = None
    drop: bool = False


@dataclass(frozen=True)
class Samples:
    """The training samples of one mixture and one length, from 0 on.

    Attributes:
        sequence: tokens that the model sees; a sample has one more.
        mixture: None for the dataset of a run that has just one.
        sources: in the order of the mixture.
        parts: the samples of each.
        firsts: the number of its first sample among those of `parts`.
        limit: the number of samples until a source is over; None if that does not happen.
        over: the source.
        eod: the end token, if documents of a sample do not see each other.
    """

    sequence: int
    mixture: Mixture | None
    sources: tuple[MixtureSource, ...]
    parts: tuple[SampleIndex, ...]
    firsts: tuple[int, ...]
    limit: int | None = None
    over: MixtureSource | None = None
    eod: int | None = None

    @property
    def recut(self) -> list[str]:
        """What a change of length does to each dataset's epoch; none if nothing."""
        several = len(self.parts) > 1
        return [
            f"{source.name}: {part.recut}" if several else part.recut
            for source, part in zip(self.sources, self.parts, strict=True)
            if part.recut is not None
        ]

    def sample(self, k: int) -> Int64:
        """Sample k >= 0, ``[sequence + 1]`` token ids.

        Raises:
            DataError: an id is not in the vocabulary.
        """
        if k < 0:
            raise IndexError(f"sample {k}")
        index, number = (0, k) if self.mixture is None else self.mixture.at(k)
        return self.parts[index].sample(self.firsts[index] + number)

    def batch(self, start: int, count: int) -> Int64:
        """Samples ``[start, start + count)``, ``[count, sequence + 1]`` token ids."""
        rows = np.empty((count, self.sequence + 1), np.int64)
        for row in range(count):
            rows[row] = self.sample(start + row)
        return rows


@dataclass(frozen=True)
class RunData:
    """All datasets of a run; they have one tokenizer.

    Attributes:
        config: the run's `data`.
        stages: the sources of each stage.
        watched: datasets that are only validated on, by name (`data.validation`).
        separate: the stages in which the documents of a sample do not see each other.
    """

    config: DataConfig
    stages: tuple[tuple[MixtureSource, ...], ...]
    watched: Mapping[str, PreparedData] = field(default_factory=dict)
    separate: Collection[int] = ()

    @cached_property
    def datasets(self) -> dict[str, MixtureSource]:
        """All datasets by fingerprint, those of the first stage first."""
        found: dict[str, MixtureSource] = {}
        for sources in self.stages:
            for source in sources:
                found.setdefault(source.data.fingerprint, source)
        return found

    @property
    def first(self) -> PreparedData:
        """One of the datasets; what all have in common is read from it."""
        return self.stages[0][0].data

    @property
    def path(self) -> str:
        """The directories of the first stage's datasets."""
        return " ".join(self.config.paths)

    @property
    def home(self) -> str | None:
        """The fingerprint of the dataset that samples of no mixture are from."""
        return None if self.config.path is None else self.first.fingerprint

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return self.first.vocab_size

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all datasets, loaded on first use."""
        return self.first.tokenizer

    @property
    def tokenizer_sha256(self) -> str:
        """sha256 of the tokenizer's file."""
        return self.first.content.tokenizer_sha256

    @property
    def fingerprint(self) -> str:
        """That of the dataset, or of the mixture of the first stage."""
        return self.home or mixture_of(self.stages[0]).fingerprint

    def eod(self, stage: int) -> int | None:
        """Id of the end token, if documents of a stage's samples do not see each other."""
        return self.first.eod if stage in self.separate else None

    def mixture(self, stage: int) -> Mixture | None:
        """The mixture of a stage; None for the one dataset of `data.path`."""
        sources = self.stages[stage]
        if len(sources) == 1 and sources[0].data.fingerprint == self.home:
            return None
        return mixture_of(sources)

    def continues(self, mixture: Mixture | None, stage: int) -> bool:
        """Whether samples of this mixture are of this stage: all sources, or those not over yet."""
        whole = self.mixture(stage)
        if mixture is None or whole is None or mixture == whole:
            return mixture == whole
        droppable = {s.data.fingerprint for s in self.stages[stage] if s.drop}
        gone = set(whole.names) - set(mixture.names)
        return gone <= droppable and mixture == mixture_of(self.stages[stage], without=gone)

    def samples(
        self, stage: int, sequence: int, *, seed: int, position: Position, mixture: Mixture | None
    ) -> Samples:
        """The samples of a mixture of a stage, for a run at a position.

        Args:
            stage: its index.
            sequence: tokens that the model sees; a sample has one more.
            seed: the run's.
            position: of the run; its last part may be of these samples.
            mixture: that of the stage, or what is left of it (`continues`).

        Raises:
            DataError: a dataset is smaller than one sample.
        """
        by_name = {source.data.fingerprint: source for source in self.stages[stage]}
        names = mixture.names if mixture is not None else tuple(by_name)
        before, _ = position.split(sequence, mixture)
        sources, parts, firsts = tuple(by_name[name] for name in names), [], []
        limit, over = None, None
        for index, source in enumerate(sources):
            earlier, done = before.of(source.data.fingerprint, home=self.home).split(sequence)
            parts.append(SampleIndex(source.data.train, sequence, seed, earlier.pairs))
            firsts.append(done)
            if mixture is not None and source.epochs is not None:
                seen = sum(length * count for length, count in earlier.pairs) + done * sequence
                left = (int(source.epochs * parts[-1].windows) * sequence - seen) // sequence
                ends = mixture.last(index, max(0, left))
                if limit is None or ends < limit:
                    limit, over = ends, source
        return Samples(
            sequence, mixture, sources, tuple(parts), tuple(firsts), limit, over, self.eod(stage)
        )

    def samples_for(
        self, stage: int, sequence: int, *, seed: int, position: Position, batch: int, inside: bool
    ) -> tuple[Samples, list[MixtureSource]]:
        """The samples of a run's next step, and the sources that are over at it.

        Args:
            stage: its index.
            sequence: tokens of a sample.
            seed: the run's.
            position: of the run.
            batch: samples of the step.
            inside: whether the stage has trained already.

        Raises:
            DataError: a source is over, and is not to be dropped; or all are.
        """
        mixture = self.mixture(stage)
        if inside and position.taken and self.continues(position.taken[-1].mixture, stage):
            mixture = position.taken[-1].mixture
        gone: list[MixtureSource] = []
        while True:
            found = self.samples(stage, sequence, seed=seed, position=position, mixture=mixture)
            _, done = position.split(sequence, mixture)
            if found.limit is None or done + batch <= found.limit:
                return found, gone
            assert found.over is not None and mixture is not None
            if not found.over.drop or len(found.sources) == 1:
                raise _is_over(found.over, stage, alone=len(found.sources) == 1)
            gone.append(found.over)
            left = set(mixture.names) - {found.over.data.fingerprint}
            names = {s.data.fingerprint for s in self.stages[stage]}
            mixture = mixture_of(self.stages[stage], without=names - left)

    def tokens_seen(self, position: Position) -> dict[str, int]:
        """Tokens that a run has taken from each of its datasets, by name."""
        return {
            source.name: sum(p.sequence * p.samples for p in position.of(key, home=self.home).taken)
            for key, source in self.datasets.items()
        }

    def validation_sets(self, *, sequence: int, count: int, multiple: int = 1) -> dict[str, Int64]:
        """Validation samples of each of the first stage's datasets, by name.

        Their numbers are in the proportion of the weights, at least one each.

        Args:
            sequence: tokens that the model sees.
            count: of all samples.
            multiple: what the number of each dataset's samples is to be a multiple of, if there
                are several.

        Raises:
            DataError: as `validation_samples`.
        """
        sources = self.stages[0]
        parts = parts_of(count, [source.weight for source in sources], multiple)
        return {
            source.name: validation_samples(source.data.validation, sequence=sequence, count=part)
            for source, part in zip(sources, parts, strict=True)
        }

    def watched_sets(self, *, sequence: int, count: int) -> dict[str, Int64]:
        """`count` validation samples, or all, of each dataset of `data.validation`, by name.

        Raises:
            DataError: as `validation_samples`.
        """
        return {
            name: validation_samples(data.validation, sequence=sequence, count=count)
            for name, data in self.watched.items()
        }

    def text_bytes(self, samples: Int64) -> int:
        """UTF-8 bytes of the text of the labels of samples ``[n, sequence + 1]``.

        A character that a sample's border cuts may count as more or fewer.
        """
        marks = [self.first.content.eod, self.first.content.bos]
        rows = (row[~np.isin(row, [m for m in marks if m is not None])] for row in samples[:, 1:])
        return sum(len(self.tokenizer.decode(row.tolist()).encode()) for row in rows)

    def in_words(self, mixture: Mixture | None) -> str:
        """A mixture by the names of its datasets, or fingerprints of others."""
        if mixture is None:
            return f"{self.first.path} alone"
        named = {key: source.name for key, source in self.datasets.items()}
        return ", ".join(
            f"{mixture.share(key):.4g} {named.get(key, f'data of fingerprint {key[:12]}')}"
            for key in mixture.names
        )

    def verify(self) -> int:
        """Read all files and verify their checksums; returns the number of bytes.

        Raises:
            DataError: a file does not match its ``dataset.json``.
        """
        datasets = [source.data for source in self.datasets.values()]
        return sum(map(verify, [*datasets, *self.watched.values()]))


def open_data(config: Config) -> RunData:
    """Open all datasets of a run, and check that they have one tokenizer.

    Raises:
        DataError: a dataset is missing or damaged, has another tokenizer than the others or than
            `data.tokenizer`, is there twice, or has no end token that a stage needs.
    """
    opened: dict[str, PreparedData] = {}
    sections: list[StageDataConfig] = [
        stage_data(config, index) for index in range(len(config.stages))
    ]
    for section in (config.data, *sections):
        for path in section.paths:
            if path not in opened:
                opened[path] = open_dataset(path, config.data.tokenizer)
    first, *others = opened
    for path in others:
        require_same_tokenizer(path, opened[path].content, first, opened[first].content)
    watched = {
        name: opened.get(path) or open_dataset(path, config.data.tokenizer)
        for name, path in (config.data.validation or {}).items()
    }
    for name, data in watched.items():
        where = f"data.validation.{name}: {data.path}"
        require_same_tokenizer(where, data.content, first, opened[first].content)
    by_fingerprint: dict[str, str] = {}
    for path, data in opened.items():
        if (other := by_fingerprint.setdefault(data.fingerprint, path)) != path:
            raise DataError(f"{path}: the same data as {other}", fix=f"give {other} alone, with "
                            "the weights of both")  # fmt: skip
    last = [Path(path).name for path in opened]
    if clash := set(watched) & {*last, *opened}:
        raise DataError(
            f"data.validation: {min(clash)} is the name of a dataset that is trained on",
            fix="choose another name: each has its loss under its name",
        )
    separate = [i for i in range(len(sections)) if stage_documents(config, i) == "mask"]
    for path in {path for index in separate for path in sections[index].paths}:
        require_ends(opened[path])
    names = {path: path if last.count(Path(path).name) > 1 else Path(path).name for path in opened}
    return RunData(
        config.data,
        tuple(tuple(_sources(section, opened, names)) for section in (config.data, *sections[1:])),
        watched,
        separate,
    )


def mixture_of(sources: tuple[MixtureSource, ...], *, without: Collection[str] = ()) -> Mixture:
    """The mixture of sources, but for those with these fingerprints."""
    weights = {s.data.fingerprint: s.weight for s in sources}
    return Mixture.of({name: weight for name, weight in weights.items() if name not in without})


def _sources(
    section: StageDataConfig, opened: Mapping[str, PreparedData], names: Mapping[str, str]
) -> Iterator[MixtureSource]:
    if section.path is not None:
        yield MixtureSource(names[section.path], opened[section.path])
    for one in section.sources or ():
        drop = one.at_end == "drop"
        yield MixtureSource(names[one.path], opened[one.path], one.weight, one.epochs, drop)


def _is_over(source: MixtureSource, stage: int, *, alone: bool) -> DataError:
    return DataError(
        f"stages[{stage}]: {source.name} is over",
        found=f"{source.epochs:g} passes over it, the most that it may have",
        expected="samples for the whole stage",
        fix="a shorter run, a smaller weight, or a larger `epochs` of the source"
        + ("" if alone else "; or at_end: drop, and the other sources take its share"),
    )
