"""The matrix of the comparison: models, layouts, dtypes and backends.

To add a model family, add an entry to `FAMILIES`; to add a mesh, add one to `MESHES`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from jax_simpo.config import TrainConfig, load_config
from jax_simpo.data.groups import GroupLengths
from jax_simpo.data.packing import StepPlan
from jax_simpo.data.rows import RowShape

# Tiny random models: name -> the keys of a Hugging Face config that differ from `SIZES`.
FAMILIES: dict[str, dict[str, Any]] = {
    # Heads of 64, because the GPU kernels take no smaller ones.
    "llama": {"num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False},
    "llama3": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        # So small that each of the three bands holds some of the wavelengths within the length of a row.
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    # Windows shorter than the sequences, soft caps within the reach of scores and logits.
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 24},
    "gemma2": {
        "model_type": "gemma2",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 32},
}
SIZES: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
# Adapters on a frozen model: name -> the family whose start model is the base, and the keys that its config adds.
ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3 + LoRA": ("llama3", {"use_peft": True, "lora_r": 4, "lora_alpha": 6}),
    "mistral + LoRA": ("mistral", {"use_peft": True, "lora_r": 8, "lora_alpha": 8}),
    "gemma2 + LoRA": (
        "gemma2",
        {"use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj", "v_proj", "down_proj"]},
    ),
    "qwen2 + LoRA": (
        "qwen2",
        {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "v_proj"]},
    ),
    "qwen3 + LoRA": ("qwen3", {"use_peft": True, "lora_r": 2, "lora_alpha": 4}),
}
QUICK_ADAPTED = ("llama3 + LoRA", "gemma2 + LoRA")  # the adapters of the quick matrix, on all and on some layers
# Objectives other than SimPO: name -> the family whose start model is trained, the family whose start model is the
# reference (None: its own), and the keys that its config adds. One of them also gives the pairs weights.
OBJECTIVES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama3 + DPO": ("llama3", "llama", {"objective": "dpo", "beta": 0.01, "gamma_beta_ratio": None}),
    "llama3 + sigmoid_norm, weighted": (
        "llama3",
        None,
        {"objective": "sigmoid_norm", "beta": 5.0, "gamma_beta_ratio": None, "weight_column": "weight"},
    ),
    "llama3 + ORPO": (
        "llama3",
        None,
        {"objective": "orpo", "beta": 0.1, "gamma_beta_ratio": None, "sft_weight": 1.0},
    ),
}
# Groups of three to five conversations that part at different turns, as trees in the rows of the JAX side: name -> the
# family whose start model is trained, and the keys that its config adds.
GROUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3 + groups": (
        "llama3",
        {"train_on": "assistant_turns", "compare_weights": "score_gap", "mean_over": "pairs"},
    ),
}
USER_FAMILY = "checkpoint"  # the name of a user's own model in reports

LAYOUTS = {"separate": (False, False), "shared": (True, False), "shared + packed": (True, True)}  # sharing, packing
DTYPES = ("float32", "bfloat16")
MESHES = {"jax, 1 device": (1, 1), "jax, fsdp=8": (8, 1), "jax, fsdp=4 x tensor=2": (4, 2)}  # fsdp, tensor
# Backends that the tiny models are also run on where there are GPUs (a user's own model runs on GPUs throughout).
# Name -> `torch_attention`.
JAX_GPU = "jax, 1 GPU"
TORCH_GPU = {"torch, GPU, FlexAttention": "flex", "torch, GPU, flash attention 2": "flash_attention_2"}
GPU_BACKENDS = (JAX_GPU, *TORCH_GPU)
TORCH, ZERO3 = "torch, 1 process", "torch, ZeRO-3 on 2 ranks"
REFERENCE = TORCH
ROW_MULTIPLE = 128

# Llama runs in the full matrix. Where the other families differ from it does not depend on mesh and dtype. The quick
# matrix runs only the second Llama on all meshes, and the first one on the mesh of the others.
FULL_FAMILIES, QUICK_FAMILY = ("llama", "llama3"), "llama3"
PART_LAYOUTS, PART_DTYPES = ("separate", "shared + packed"), ("float32",)
PART_BACKENDS = (TORCH, "jax, fsdp=4 x tensor=2")

# Partitions every parameter, however small, and keeps no gathered one for later.
DEEPSPEED = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}

# The distance of one bfloat16 curve from its float32 curve is a single draw, because later steps carry the rounding
# errors of early ones along. So bfloat16 also runs with the pairs in other orders, in the default layout.
ORDERS, ORDERS_LAYOUT = 8, "shared + packed"

# The cell that the wrong variants are tried in, and other families for the variants that this one cannot show.
VARIANTS_FAMILY, VARIANTS_LAYOUT, VARIANTS_BACKEND = "llama3", "shared + packed", "jax, 1 device"
FAMILY_OF_VARIANT = {
    "Gemma norm without the one": "gemma2",
    "sliding window dropped": "mistral",
    "reference and policy swapped": "llama3 + DPO",
    "reference sums of chosen and rejected swapped": "llama3 + DPO",
    "means where sums belong": "llama3 + DPO",
    "cross-entropy over prompts too": "llama3 + DPO",
    "sums where means belong": "llama3 + sigmoid_norm, weighted",
    "reference with another template": "llama3 + sigmoid_norm, weighted",
    "weights divided by their sum": "llama3 + sigmoid_norm, weighted",
    "subtree ends a token late": "llama3 + groups",
    "positions count the row": "llama3 + groups",
    "shared target scored once": "llama3 + groups",
    "turns of users scored": "llama3 + groups",
}


@dataclass(frozen=True)
class Cell:
    """One run: a model, a layout, a dtype, a backend, and the order of the pairs (0 is the config's own)."""

    family: str
    layout: str
    dtype: str
    backend: str
    order: int = 0

    @property
    def folder(self) -> str:
        """The folder of the cell's results, relative to the folder of all results."""
        return "/".join(str(part).replace(" ", "").replace(",", "-") for part in asdict(self).values())

    @property
    def name(self) -> str:
        order = f", order {self.order}" if self.order else ""
        return f"{self.family}, {self.layout}, {self.dtype}{order}: {self.backend}"

    def on(self, backend: str) -> Cell:
        """Returns the same run on another backend."""
        return replace(self, backend=backend)

    @property
    def reference(self) -> Cell:
        """The run that this one is compared with: PyTorch's in the same layout, or of groups on separate sequences."""
        return replace(self, backend=REFERENCE, layout="separate" if self.family in GROUPS else self.layout)

    @property
    def exists(self) -> bool:
        """True if the cell is part of the matrix. Flash attention takes no masks of rows and computes in 16 bits."""
        if self.family in ({*FAMILIES, *ADAPTED, *OBJECTIVES, *GROUPS} - set(FULL_FAMILIES)):
            return self._in_every_family
        if self.order and (self.layout != ORDERS_LAYOUT or (self.dtype == "float32" and self.backend != REFERENCE)):
            return False
        flash = TORCH_GPU.get(self.backend) == "flash_attention_2"
        return not flash or (self.layout == "separate" and self.dtype == "bfloat16")

    @property
    def is_quick(self) -> bool:
        """True if the cell is part of the quick matrix, provided that it exists."""
        if self.family in ADAPTED and self.family not in QUICK_ADAPTED:
            return False
        small_llama = self.family in FULL_FAMILIES and self.family != QUICK_FAMILY
        return self.dtype == "float32" and (not small_llama or self._in_every_family or self.backend in GPU_BACKENDS)

    @property
    def _in_every_family(self) -> bool:
        part = self.layout in PART_LAYOUTS and self.dtype in PART_DTYPES and self.backend in PART_BACKENDS
        return part and not self.order

    @property
    def overrides(self) -> list[str]:
        """The command-line options that turn the family's config into that of this run."""
        sharing, packing = LAYOUTS[self.layout]
        keys = {"prefix_sharing": sharing, "packing": packing, "dtype": self.dtype}
        if self.order:
            keys["seed"] = self.order
        if self.backend in TORCH_GPU:
            keys["torch_attention"] = TORCH_GPU[self.backend]
        return [f"--{key}={str(value).lower()}" for key, value in keys.items()]


@dataclass(frozen=True)
class Job:
    """The task of a comparison, as its processes read it from a file.

    Attributes:
        work: the folder of everything that the comparison reads and writes.
        configs: family -> its config file.
        new_models: family -> the Hugging Face config of its random start model; absent for a user's own model.
        cells: the runs to make.
        variants: names of the wrong variants to try.
        pairs: number of the data's pairs to use.
        batch: pairs per optimizer step.
        rows: rows of a micro-batch over all devices, a multiple of the devices of every backend.
        steps: optimizer steps.
        inject: a wrong variant to put into every cell of JAX, to see the check fail.
        adapters: family -> the folder of the adapter to start from, for families that train one.
    """

    work: str
    configs: dict[str, str]
    new_models: dict[str, dict[str, Any]]
    cells: list[Cell]
    variants: list[str]
    pairs: int
    batch: int
    rows: int
    steps: int
    inject: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        return Path(self.work) / "job.json"

    @property
    def deepspeed_file(self) -> Path:
        return Path(self.work) / "deepspeed.json"

    def save(self) -> None:
        self.deepspeed_file.write_text(json.dumps(DEEPSPEED), encoding="utf-8")
        self.file.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @staticmethod
    def load(file: str | Path) -> Job:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
        # The folder may have been moved since.
        return Job(**values | {"work": str(Path(file).parent), "cells": [Cell(**c) for c in values["cells"]]})

    def config(self, cell: Cell) -> TrainConfig:
        """Loads the config of a run, as a user would write it."""
        return load_config(self.configs[cell.family], cell.overrides, torch=True)

    def results_folder(self, cell: Cell) -> Path:
        """Returns the folder of a cell's results."""
        return Path(self.work) / "results" / cell.folder

    def variant_folder(self, name: str) -> Path:
        """Returns the folder of a wrong variant's results."""
        return Path(self.work) / "variants" / name.replace(" ", "-")

    def layouts(self, family: str) -> list[str]:
        """Lists the layouts that a family is run in."""
        return [layout for layout in LAYOUTS if any((c.family, c.layout) == (family, layout) for c in self.cells)]

    def variant_cell(self, name: str) -> Cell:
        """Returns the cell that a wrong variant is a variant of."""
        wanted = FAMILY_OF_VARIANT.get(name, VARIANTS_FAMILY)
        family = wanted if wanted in self.configs else next(iter(self.configs))
        return Cell(family, VARIANTS_LAYOUT, "float32", VARIANTS_BACKEND)


def matrix(families: Iterable[str], backends: Iterable[str], *, quick: bool = False) -> list[Cell]:
    """Lists the existing cells of all combinations with all layouts; bfloat16 also in other orders of the pairs."""
    combinations = product(families, DTYPES, list(backends), range(1 if quick else ORDERS), LAYOUTS)
    cells = [Cell(family, layout, dtype, backend, order) for family, dtype, backend, order, layout in combinations]
    return [cell for cell in cells if cell.exists and (cell.is_quick or not quick)]


def step_plan(job: Job, config: TrainConfig, lengths: GroupLengths) -> StepPlan:
    """Makes the step plan of a cell.

    Rows and micro-batches have the same shape in all layouts and on all backends, so that a model is compiled once for
    each mesh.
    """
    lengths = first_groups(lengths, job.pairs)
    longest, most_targets = int(lengths.row_tokens(False).max()), int(lengths.row_targets().max())
    responses = int(lengths.sizes.max()) * job.batch
    shape = RowShape(_round_up(longest), max(_round_up(longest), _round_up(most_targets)), responses)
    prompt_targets = bool(config.sft_weight) and config.sft_over == "prompt_and_response"
    sharing, packing = config.prefix_sharing, config.packing
    return StepPlan(lengths, shape, job.batch, job.rows, sharing, packing, config.seed, prompt_targets)


def first_groups(lengths: GroupLengths, count: int) -> GroupLengths:
    """Returns the lengths of the first groups of a split."""
    return lengths.of_groups(np.arange(min(count, len(lengths))))


def write_config(file: Path, values: Mapping[str, Any]) -> None:
    """Writes a config file (JSON is YAML)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _round_up(n: int) -> int:
    return -(-n // ROW_MULTIPLE) * ROW_MULTIPLE
