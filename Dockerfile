# leanserve on a CPU, or on NVIDIA GPUs. One stage: every dependency comes as a wheel, so there is no compiler that a second stage could
# leave behind.
#
#   docker build -t leanserve .
#   docker run --rm -p 127.0.0.1:8000:8000 -v leanserve-cache:/var/cache/leanserve leanserve
#
# Your own model, with what it needs (extras as in pyproject.toml):
#   docker build -t leanserve --build-arg EXTRAS=cpu,text,grpc .
#   docker run --rm -p 127.0.0.1:8000:8000 -v leanserve-cache:/var/cache/leanserve \
#     -v ./mine:/mine:ro -e LEANSERVE_CONFIG=/mine/leanserve.yaml leanserve
#
# The default torch for Linux carries CUDA. PyTorch's own package index has a CPU-only build that is gigabytes smaller; its
# address is in PyTorch's installation guide:
#   docker build -t leanserve --build-arg TORCH_INDEX_URL=ADDRESS .
#
# For NVIDIA GPUs: onnxruntime for CUDA instead of the extra `cpu`, and the default torch. The CUDA libraries come with the
# wheels, the driver with the host's container toolkit (docs/gpu.md):
#   docker build -t leanserve:gpu --build-arg EXTRAS=gpu .
#   docker run --rm --gpus all -p 127.0.0.1:8000:8000 -v leanserve-cache:/var/cache/leanserve leanserve:gpu
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

WORKDIR /src

# Slowest to change first: torch, then the other dependencies (installed for a package that is still empty), then us.
ARG TORCH_INDEX_URL=""
RUN pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch>=2.11,<2.14"
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY service/leanserve/__init__.py service/leanserve/
ARG EXTRAS=cpu
RUN mkdir -p models/leanserve_models && pip install --constraint constraints.txt ".[$EXTRAS]"
COPY service service
COPY models models
RUN pip install --no-deps --force-reinstall .

RUN useradd --create-home --uid 10001 leanserve \
    && install -d -o leanserve -g leanserve /var/cache/leanserve
USER leanserve
WORKDIR /app
COPY models/*.yaml models/
ENV LEANSERVE_CACHE=/var/cache/leanserve
ENV LEANSERVE_CONFIG=models/digits.yaml
ENV MPLCONFIGDIR=/tmp/matplotlib
VOLUME /var/cache/leanserve

EXPOSE 8000
# A first start builds every variant before it is ready, hence the long start period. What would kill an unhealthy
# container (Kubernetes, Swarm) should ask /healthz, which is 200 from the first second.
COPY deploy/ready.py /usr/local/lib/leanserve-ready.py
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "/usr/local/lib/leanserve-ready.py", "127.0.0.1:8000"]

ENTRYPOINT ["leanserve"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
