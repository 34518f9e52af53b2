"""The report of a run: what its log says, as one HTML page that needs nothing else."""

from __future__ import annotations

from megagrow.report.log import read_metrics
from megagrow.report.page import write_report

__all__ = ["read_metrics", "write_report"]
