"""The report of a run: verdict lines, a table for the terminal, figures and one self-contained page."""

from verl_avar.report.report import HeatmapSample, print_table, render, verdicts

__all__ = ["HeatmapSample", "print_table", "render", "verdicts"]
