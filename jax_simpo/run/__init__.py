"""The folder of a run: its files, the rules for writing, continuing and removing them, and the report made of them.

Nothing here imports jax, but for `checkpoint`. Both trainers follow these rules.
"""
