"""Turns preference pairs on disk into row batches of static shape. Nothing here imports jax or torch."""
