"""From preference pairs on disk to static-shape row batches. Neither jax nor torch is imported here."""
