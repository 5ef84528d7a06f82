"""Reports: verdict lines, a table for the terminal, figures and one self-contained page.

Of a run (`report`, exported here), of its checkpoints (`model_card`), and of `avar vas` (`vas_page`: print_vas,
render_vas).
"""

from verl_avar.report.report import HeatmapSample, print_table, render, verdicts

__all__ = ["HeatmapSample", "print_table", "render", "verdicts"]
