# The pipeline on a CPU: export, calibrate, quantize, validate, publish, and compile checks for GPUs.
#   docker build -f docker/cpu.Dockerfile -t enginewright:cpu .
#   docker run --rm -v "$PWD:/work" enginewright:cpu build --precision int8
ARG PYTHON=3.11-slim-bookworm
FROM python:${PYTHON}

ARG TORCH=2.13.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 NUMBA_CACHE_DIR=/tmp/numba
WORKDIR /opt/enginewright
COPY pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
COPY calibrators calibrators
COPY engines engines
# torch alone and first: this version's wheel needs no CUDA packages, which a resolver might otherwise pick up with it.
RUN pip install "torch==${TORCH}" \
 && pip install ".[torch,text,images,triton,rtx]" \
 && useradd --create-home --uid 10001 builder
USER 10001
WORKDIR /work
ENTRYPOINT ["python", "-m", "pipeline"]
CMD ["doctor"]
