"""Our flash attention kernel for Hopper GPUs, written in Pallas (Mosaic GPU)."""
