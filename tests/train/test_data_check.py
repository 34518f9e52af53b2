"""No run trains on a dataset that differs from its manifest, and each says how it validates."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from megagrow.data.sampler import VALIDATION
from megagrow.train import checkpoints
from megagrow.train.agreement import validation_changes
from tests.jobs import launch, log_of, settings, write_config


def config(dataset, tmp_path, **changes):
    mapping = settings(dataset, tmp_path / "run", **changes)
    return write_config(tmp_path / "run.yaml", mapping)


def damaged(dataset, tmp_path, change):
    copy = shutil.copytree(dataset, tmp_path / "copy")
    tokens = np.memmap(copy / "train.bin", np.uint16, "r+")
    change(tokens)
    tokens.flush()
    return copy


def _saves_as_before(rank):
    """Checkpoints in the old form, without fingerprints of the validation."""
    made = checkpoints.meta_of

    def without(*arguments, **more):
        meta = made(*arguments, **more)
        del meta.fingerprints["validation"]
        return meta

    checkpoints.meta_of = without


def test_damaged_tokens_are_not_trained_on_and_a_run_says_how_it_validates(tmp_path, dataset):
    def flip(tokens):
        tokens ^= 1  # the lowest bit of every token: each is still in the vocabulary

    copy = damaged(dataset, tmp_path, flip)
    path = config(dataset, tmp_path, train={"validation_samples": 10_000})
    given = ["--config", path]
    bad, first, again = launch(
        2,
        [*given, f"data.path={copy}", f"run.dir={tmp_path / 'bad'}"],
        [*given, "train.stop_after_steps=1"],
        [*given, "train.stop_after_steps=2"],
        hook=(_saves_as_before,),
    )
    assert [o.status for o in bad] == [1, 1]
    assert f"{copy / 'train.bin'}: checksum" in bad[0].err and "--overwrite" in bad[0].err
    assert not (tmp_path / "bad" / "checkpoints").exists()

    assert [o.status for o in first + again] == [0] * 4
    assert "MB agree with their checksums" in first[0].err
    assert "all that the data has of 8 tokens (train.validation_samples = 10000)" in first[0].err
    assert "validation samples: the first of the split -> spread over" in again[0].err
    assert [x["step"] for x in log_of(path) if x["event"] == "step"] == [1, 2]


def test_an_id_that_the_vocabulary_does_not_have_is_named(tmp_path, dataset):
    def spoil(tokens):
        tokens[:] = 60_000

    copy = damaged(dataset, tmp_path, spoil)
    [[outcome]] = launch(1, ["--config", config(copy, tmp_path), "data.verify=false"])
    assert outcome.status == 1 and "data.verify is off" in outcome.err
    assert f"{copy / 'train.bin'}: a token id that the vocabulary does not have" in outcome.err
    assert "in sample 0" in outcome.err and "found:    60000 at token" in outcome.err


@pytest.mark.parametrize("stored", [{}, {"validation": VALIDATION}])
def test_a_checkpoint_of_before_is_known_to_have_validated_on_the_first_samples(stored):
    changes = validation_changes(stored)
    assert len(changes) == (not stored)
    assert all("the first of the split -> spread over the whole split" in x for x in changes)
