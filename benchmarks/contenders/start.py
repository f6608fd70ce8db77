"""Writes the model that every contender starts from, and the reference if there is one.

Their weights are random, float32, as transformers draws them, from different seeds.
"""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.contenders.job import Job


def main(file: str) -> None:
    job = Job.load(file)
    config = LlamaConfig(**{key: value for key, value in job.model.items() if key != "model_type"})
    folders = [job.start, *([] if job.reference is None else [job.reference])]
    for seed, folder in enumerate(folders):
        torch.manual_seed(seed)
        with torch.device("cuda" if job.device == "gpu" else "cpu"):
            LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    main(sys.argv[1])
