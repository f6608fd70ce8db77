"""The backend `triton`: flash attention kernels for NVIDIA GPUs from Ampere on, by Pallas' Triton lowering."""
