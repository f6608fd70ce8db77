"""The contenders of `benchmarks.peers`, each a worker process: `python -m benchmarks.contenders.NAME JOB.json ...`."""
