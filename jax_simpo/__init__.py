"""SimPO training on preference pairs in JAX, with prefix sharing and packing."""

__version__ = "0.1.0"
