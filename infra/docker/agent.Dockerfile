# Optional: an image in which the training requirements are installed already, so that a rented
# machine starts sooner. The stock image works too; the agent then installs them itself.
ARG BASE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime
FROM ${BASE}
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
COPY gpu_agent/constraints.txt /tmp/constraints.txt
COPY pyproject.toml README.md LICENSE /src/
COPY gpu_agent /src/gpu_agent
# torch is the image's own and is never replaced.
RUN python -c "import torch; print('torch==' + torch.__version__.split('+')[0])" >> /tmp/constraints.txt \
    && cd /src && pip install -c /tmp/constraints.txt ".[train]"
