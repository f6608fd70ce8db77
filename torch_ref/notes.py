"""Words the notes that a run prints about its data, its plan and its attention."""

from __future__ import annotations

from collections.abc import Iterator

from jax_simpo.data.packing import StepPlan, measure
from jax_simpo.data.tokenize import PairDataset
from torch_ref.attention_choice import uses_rows
from torch_ref.setup import Setup


def attention_note(setup: Setup) -> str:
    """Says which attention a run uses, and why."""
    choice, form = setup.attention, "rows" if uses_rows(setup.config) else "concatenated forward"
    return f"attention: {choice.name} ({choice.reason}; {form})"


def split_notes(setup: Setup, name: str, pairs: PairDataset, plan: StepPlan) -> Iterator[str]:
    """Says how many pairs a split has, how its rows are filled, and which of its rows were skipped.

    Args:
        setup: the setup of the run.
        name: the name of the split.
        pairs: its pairs.
        plan: its step plan.
    """
    if pairs.skipped:
        yield pairs.skipped_summary()
    text = f"{name}: {len(plan.lengths)} pairs"
    if uses_rows(setup.config):
        cost = measure(plan)
        saved = 1 - cost.input_tokens / cost.separate_tokens
        text += (
            f", rows of {plan.shape.length} tokens, fill {cost.fill:.3f}, prefix sharing saves {saved:.1%} of the "
            "tokens"
        )
    yield text
