# jax-simpo for NVIDIA GPUs, and for TPUs, with the versions that the tests have run with (constraints.txt).
#
#   docker build --target gpu -t jax-simpo:gpu .
#   docker run --gpus all --shm-size=8g -v "$PWD:/work" jax-simpo:gpu train my-run.yaml
#
#   docker build --target tpu -t jax-simpo:tpu .     # the image of configs/launch/gke-tpu.yaml
#
# The wheels of jax bring CUDA and libtpu along. Of the host a GPU needs NVIDIA's driver and the NVIDIA Container Toolkit.

FROM python:3.12-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
COPY . /opt/jax-simpo
# Runs start here: mount the folder with your config and pairs.
WORKDIR /work
ENTRYPOINT ["jax-simpo"]
CMD ["--help"]

FROM base AS tpu
RUN pip install -c /opt/jax-simpo/constraints.txt '/opt/jax-simpo[tpu]'

FROM base AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# JAX takes this share of each GPU's memory at the start; the rest is left to NCCL.
ENV XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
RUN pip install -c /opt/jax-simpo/constraints.txt '/opt/jax-simpo[gpu]'
