"""The savings benchmark as a command: plan, train, collect."""

from __future__ import annotations

import argparse
import errno
import os
import time
from pathlib import Path
from typing import Any

import torch

from megagrow.checkpoint.io.files import naming
from megagrow.config.load import load_settings, parse_config
from megagrow.data.dataset import as_prepared_by
from megagrow.data.run_data import open_data
from megagrow.engine.comm import start
from megagrow.report.figure import require_matplotlib
from megagrow.savings import clock, page, result, table
from megagrow.savings.campaign import Campaign, train
from megagrow.savings.config import SavingsConfig
from megagrow.savings.jobs import is_first, under_launcher
from megagrow.savings.known import Known, read_known
from megagrow.savings.members import check
from megagrow.train.health.agree import on_first
from megagrow.train.health.run_lock import holding_together

# Fixes for errors in a benchmark's directory, by system error.
DISK = {
    errno.ENOSPC: "free disk space, and run the same command again to continue",
    errno.EDQUOT: "free disk space within your quota, and run the same command again to continue",
    errno.EROFS: "mount it writable, or set dir to a directory that is",
    errno.EACCES: "give this user the right to write there, or set dir to another directory",
    errno.EEXIST: "name a directory, or a name that is free",
    errno.ENOTDIR: "name a directory, or a name that is free",
    errno.EIO: "check the disk (its driver reported a failure), or set dir to another one",
}


def savings(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """What growth saves against a tuned from-scratch run; returns (JSON data, text)."""
    config = load_settings(SavingsConfig, options.config, options.overrides)
    comm = start() if under_launcher() else None
    world = 1 if comm is None else comm.world
    run = parse_config({**config.target, "stages": [{"until": {"steps": 1}}]})
    with as_prepared_by(options.config, *run.data.paths):
        dataset = open_data(run)
    vocab = dataset.vocab_size
    campaign = Campaign(config, world=world, vocab=vocab, data=dataset.fingerprint)
    check(campaign.members)

    def known() -> Known:
        return read_known(options.json, options.known)

    if options.dry_run:
        campaign.known = known()
        return {}, table.plan_text(campaign) if is_first() else ""
    require_matplotlib()  # now rather than after hours of training
    until = None if options.minutes is None else time.time() + 60 * options.minutes
    home = Path(config.dir)
    with holding_together(home, comm), naming(home, "cannot be written or read", DISK):
        # Only here, since another job writing the same result may have held the directory until
        # now.
        campaign.known = known() if comm is None else on_first(comm, known)
        if not options.collect:
            at_once = 1 if torch.cuda.is_available() else os.cpu_count() or 1
            train(campaign, comm=comm, jobs=options.jobs or at_once, until=until)
        if options.clock:
            campaign.speeds = clock.take_turns(campaign, world=world, vocab=vocab)
        if not is_first():
            return {}, ""
        found = result.collect(campaign)
        page.write(campaign, found)
        return found, table.table(found)
