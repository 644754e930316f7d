# The server: NGC's Triton with what an ensemble's tokenizer or picture decoder needs. The repository is mounted, not built in.
#   docker build -f docker/serve.Dockerfile --build-arg REGISTRY=HOST_OF_NGC -t enginewright:serve .
#   docker run --rm --gpus all -p 8000:8000 -p 8001:8001 -p 8002:8002 -v "$PWD/build/minilm/triton:/models:ro" enginewright:serve
# The release must be that of the TensorRT image that built the engines (docker/build.Dockerfile).
ARG REGISTRY
ARG TRITON_RELEASE=25.08-py3
FROM ${REGISTRY}/nvidia/tritonserver:${TRITON_RELEASE}

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN pip install tokenizers==0.23.3 pillow==13.0.0
USER 1000
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=10s --start-period=120s CMD ["curl", "--fail", "--silent", "http://localhost:8000/v2/health/ready"]
ENTRYPOINT ["tritonserver"]
CMD ["--model-repository=/models", "--exit-on-error=true"]
