"""One page that says what a run has come to: `report.html`, and its numbers as `report.json`."""

from __future__ import annotations

from ltm_pyro.report.building import Report, make_report, write_report

__all__ = ["Report", "make_report", "write_report"]
