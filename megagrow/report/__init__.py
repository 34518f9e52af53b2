"""The report of a run: its log as one self-contained HTML page."""

from __future__ import annotations

from megagrow.report.log import read_metrics
from megagrow.report.page import write_report

__all__ = ["read_metrics", "write_report"]
