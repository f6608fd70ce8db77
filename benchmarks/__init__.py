"""Measurements that anyone can run again, one script per question: `python -m benchmarks.NAME --help`.

Every claim of speed is a ratio of things timed in turns in one run. Results, with machine, versions, date and commit,
go to `docs/benchmarks/`, whose README has the command behind each figure.
"""
