# The server of `bertforge serve`, for a CPU and for an NVIDIA GPU:
#   docker build --target cpu --tag bertforge:cpu .
#   docker build --target cuda --tag bertforge:cuda .
# What changes least comes first: torch, then the other libraries, then the package itself.
FROM python:3.12-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/bertforge
ENV PATH=/opt/bertforge/bin:$PATH
WORKDIR /build

FROM build AS build-cpu
# From here torch comes without CUDA's libraries, which take 3 GB.
RUN pip install --index-url https://download.pytorch.org/whl/cpu "torch>=2.11,<2.14"
COPY pyproject.toml README.md LICENSE ./
# The libraries alone: an empty package stands for ours.
RUN mkdir -p src/bertforge && touch src/bertforge/__init__.py && pip install "./[serve,openvino,onnxruntime]"
COPY src src
RUN pip install --no-deps --force-reinstall .

FROM build AS build-cuda
RUN pip install "torch>=2.11,<2.14"
COPY pyproject.toml README.md LICENSE ./
RUN mkdir -p src/bertforge && touch src/bertforge/__init__.py && pip install "./[serve,native]"
COPY src src
RUN pip install --no-deps --force-reinstall .

FROM python:3.12-slim-bookworm AS server
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin bertforge
# Whatever is written goes to /tmp, so that the rest may be read-only; and no model hub is asked.
ENV PATH=/opt/bertforge/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=4)"]
ENTRYPOINT ["bertforge"]
CMD ["serve", "--help"]

FROM server AS cuda
# Triton builds a small library for the driver with a C compiler. Debian's stable release has one version of it.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/bertforge /opt/bertforge
USER 10001

FROM server AS cpu
COPY --from=build-cpu /opt/bertforge /opt/bertforge
USER 10001
