"""The names of everything that a run writes, relative to its output directory."""

from __future__ import annotations

MANIFEST = ".jax-simpo.json"  # lists which of the names below this run wrote
LOCK = ".jax-simpo.lock"  # there while a run writes to the folder
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
MODEL = "model"
SAMPLES = "samples.jsonl"
BAD_STEPS = "bad_steps.jsonl"  # what the steps would have trained on that were not applied
FINDINGS = "findings.jsonl"  # what the program found wrong with the run while it trained
FACTS = "run.json"
TRACKING = "tracking.json"  # what the trackers have been sent
TENSORBOARD = "tensorboard"
HUB = "hub"  # the model of a save while it is uploaded
CARD = "README.md"
REPORT = "report.html"
CURVES = "curves.png"
SEAL = "seal.json"  # in a step folder: sizes and checksums of its files, written last
STEP_RUN = "run.json"  # in a step folder of the PyTorch reference: the identity of the run and the engine

# Everything but the manifest and the lock, in the order in which a run writes it.
ALL = (
    CONFIG,
    TRACKING,
    TENSORBOARD,
    METRICS,
    FACTS,
    SAMPLES,
    BAD_STEPS,
    FINDINGS,
    CHECKPOINTS,
    HUB,
    MODEL,
    REPORT,
    CURVES,
    CARD,
)
# What every run writes, whatever its config.
OF_EVERY_RUN = (CONFIG, METRICS, FACTS, SAMPLES, BAD_STEPS, FINDINGS, CHECKPOINTS, MODEL, REPORT, CURVES, CARD)
# What is written once the last step is done.
AT_THE_END = (MODEL, REPORT, CURVES, CARD)
# The PyTorch reference writes only these.
OF_TORCH_REF = (CONFIG, METRICS, FACTS, BAD_STEPS, CHECKPOINTS, MODEL)
