"""Pages, tables and differences of runs, from their directories: ``python -m pytorch_accelerated.report RUN``."""

from pytorch_accelerated.report.comparison import Parting, RunDiff, RunTable, compare_runs, diff_runs
from pytorch_accelerated.report.page import write_report
from pytorch_accelerated.report.plots import check_matplotlib
from pytorch_accelerated.report.reading import Best

__all__ = [
    "Best",
    "Parting",
    "RunDiff",
    "RunTable",
    "check_matplotlib",
    "compare_runs",
    "diff_runs",
    "write_report",
]
