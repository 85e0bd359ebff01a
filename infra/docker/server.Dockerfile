# Web, worker, beat and the command line: one image, no torch.
FROM python:3.11-slim
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY orchestrator orchestrator
COPY tasks tasks
COPY infra infra
COPY state state
COPY gpu_agent gpu_agent
RUN pip install -c constraints.txt ".[server]" && useradd --create-home stoker
USER stoker
ENTRYPOINT ["stoker"]
CMD ["--help"]
