"""Every run of these tests is quick."""

from tests.whole_runs import quick_runs

__all__ = ["quick_runs"]
