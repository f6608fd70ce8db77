"""Writes the model that every contender starts from, with random float32 weights as transformers draws them."""

from __future__ import annotations

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.contenders.job import Job


def main(file: str) -> None:
    job = Job.load(file)
    torch.manual_seed(0)
    config = LlamaConfig(**{key: value for key, value in job.model.items() if key != "model_type"})
    with torch.device("cuda" if job.device == "gpu" else "cpu"):
        LlamaForCausalLM(config).save_pretrained(job.start)


if __name__ == "__main__":
    main(sys.argv[1])
