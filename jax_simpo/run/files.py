"""The names of everything a run writes to its output directory."""

from __future__ import annotations

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
MODEL = "model"
SAMPLES = "samples.jsonl"
FACTS = "run.json"
CARD = "README.md"
REPORT = "report.html"
CURVES = "curves.png"
