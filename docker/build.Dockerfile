# Engines for data-centre GPUs: run it on the GPU that the engine is for, with the NVIDIA container toolkit.
#   docker build -f docker/build.Dockerfile --build-arg REGISTRY=HOST_OF_NGC -t enginewright:tensorrt .
#   docker run --rm --gpus all -v "$PWD:/work" enginewright:tensorrt build --precision int8 --target a100 --require-built
# The release decides TensorRT's version, and must be the one of the Triton release that serves the engine.
ARG REGISTRY
ARG TENSORRT_RELEASE=25.08-py3
FROM ${REGISTRY}/nvidia/tensorrt:${TENSORRT_RELEASE}

ARG POLYGRAPHY=0.53.6
ARG PYCUDA=2025.1.2
# The Ray of docker/kuberay.yaml; [default] is what lets a cluster take jobs.
ARG RAY=2.60.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1 NUMBA_CACHE_DIR=/tmp/numba
WORKDIR /opt/enginewright
COPY pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
COPY calibrators calibrators
COPY engines engines
# TensorRT itself is the image's: the [tensorrt] extra would bring another one.
RUN pip install ".[text,images,triton,ray]" "polygraphy==${POLYGRAPHY}" "pycuda==${PYCUDA}" "ray[default]==${RAY}" \
 && useradd --create-home --uid 10001 builder
USER 10001
WORKDIR /work
ENTRYPOINT ["python", "-m", "pipeline"]
CMD ["doctor"]
