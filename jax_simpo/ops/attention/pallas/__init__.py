"""This project's flash attention kernels for Hopper GPUs, written in Pallas (Mosaic GPU)."""
