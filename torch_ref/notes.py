"""Prints the notes of a run about its data, its step plans and its attention."""

from __future__ import annotations

from rich.console import Console

from jax_simpo.data.packing import StepPlan, measure, micro_batch_line
from jax_simpo.data.tokenize import GroupDataset
from torch_ref.attention_choice import uses_rows
from torch_ref.setup import Setup


def print_attention(console: Console, setup: Setup) -> None:
    """Prints which attention a run uses, and why."""
    choice, form = setup.attention, "rows" if uses_rows(setup.config) else "concatenated forward"
    console.print(f"attention: {choice.name} ({choice.reason}; {form})")


def print_split(console: Console, setup: Setup, name: str, groups: GroupDataset, plan: StepPlan) -> None:
    """Prints how many groups a split has, how its rows are filled, and what of it was left out.

    Args:
        console: where to.
        setup: the setup of the run.
        name: the name of the split.
        groups: its groups.
        plan: its step plan.
    """
    for layout in groups.layouts:
        console.print(layout.line, style="yellow")
    if groups.cache_damage:
        console.print(f"warning: {groups.cache_damage}; the tokens were made again", style="yellow")
    if groups.skipped:
        console.print(groups.skipped_summary(), style="yellow")
    for remark in groups.remarks():
        console.print(f"note: {remark}", style="yellow")
    text = f"{name}: {len(plan.lengths)} {plan.lengths.noun}"
    if uses_rows(setup.config):
        cost = measure(plan)
        saved = 1 - cost.input_tokens / cost.separate_tokens
        text += (
            f", rows of {plan.shape.length} tokens, fill {cost.fill:.3f}, prefix sharing saves {saved:.1%} of the "
            "tokens"
        )
        text += f"\n{name}: {micro_batch_line(plan, cost, setup.ranks.world, setup.most_rows(plan))}"
    console.print(text)
