"""Measurements that you can repeat, one script per question: `python -m benchmarks.NAME --help`.

Every claim of speed is a ratio of two times that were taken in turns in one run. Results, with machine, versions, date
and commit, go to `docs/benchmarks/`, whose README has the command behind each figure.
"""
