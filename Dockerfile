# jax-simpo for NVIDIA GPUs, and for TPUs.
#
#   docker build --target gpu -t jax-simpo:gpu .
#   docker run --gpus all --shm-size=8g -v "$PWD:/work" jax-simpo:gpu train my-run.yaml
#
#   docker build --target tpu -t jax-simpo:tpu .     # the image of configs/launch/gke-tpu.yaml
#
# Python's packages, jax and jaxlib among them, have the versions that the tests have run with (constraints.txt). That
# file names nothing of CUDA and no libtpu. jax asks for them: for its CUDA plugin in its own version, for one series of
# libtpu, and for NVIDIA's libraries in ranges, of which pip takes the newest on the day of the build.
#
# Of the host a GPU needs NVIDIA's driver and the NVIDIA Container Toolkit.

# Newer releases of tokamax, which has the attention kernel for TPUs, need Python 3.12 and a newer jax.
FROM python:3.12-slim-bookworm AS tpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
COPY . /opt/jax-simpo
RUN pip install -c /opt/jax-simpo/constraints.txt '/opt/jax-simpo[tpu]'
# Runs start here: mount the folder with your config and pairs.
WORKDIR /work
ENTRYPOINT ["jax-simpo"]
CMD ["--help"]

# Python 3.11 keeps to jax 0.10. Python 3.12 would take jax 0.12, which compiles the attention kernels for Hopper GPUs
# in a way that may make them slow (`jax-simpo doctor` warns of it).
FROM python:3.11-slim-bookworm AS gpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# JAX takes this share of each GPU's memory at the start; the rest is left to NCCL.
ENV XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
COPY . /opt/jax-simpo
RUN pip install -c /opt/jax-simpo/constraints.txt '/opt/jax-simpo[gpu]'
WORKDIR /work
ENTRYPOINT ["jax-simpo"]
CMD ["--help"]
