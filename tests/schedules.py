"""The learning-rate schedules that both trainers are tested on, with transformers' own as the oracle."""

from __future__ import annotations

from typing import Any

TOTAL, PEAK = 37, 3e-4
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("cosine", {}),
    ("linear", {}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr": 0.0}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
    ("warmup_stable_decay", {"num_decay_steps": 10}),
    ("warmup_stable_decay", {"num_decay_steps": 12, "min_lr_ratio": 0.2, "decay_type": "linear"}),
    ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "1-sqrt"}),
]


def name(value: Any) -> str:
    """Returns the name of a test's parameter."""
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def rates_of_transformers(kind: str, warmup: int, settings: dict[str, Any]) -> list[float]:
    """Returns the learning rate of each of `TOTAL` steps."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    scheduler = get_scheduler(
        kind, optimizer, num_warmup_steps=warmup, num_training_steps=TOTAL, scheduler_specific_kwargs=settings
    )
    rates = []
    for _ in range(TOTAL):
        rates.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return rates
