"""SimPO in PyTorch: transformers and DeepSpeed ZeRO-3, an independent reference for the JAX trainer.

It shares the config and the data (pairs, step plans, rows) with `jax_simpo`, and nothing that computes.
"""
