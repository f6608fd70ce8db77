"""Trains on preferences in PyTorch, transformers and DeepSpeed ZeRO-3: an independent reference for the JAX trainer.

It shares the config, the data (groups, step plans, rows) and the files of a run with `jax_simpo`, but no mathematics.
"""
