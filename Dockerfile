# One image for head, worker, job and server (container/entrypoint.sh says how); docs/deployment.md.
#   docker build -t meanet .
#   docker build -t meanet:cuda --build-arg TORCH=cuda .
#   docker run --rm --shm-size=1g meanet job demo digits
FROM python:3.11-slim-bookworm AS wheel

WORKDIR /src
COPY constraints.txt pyproject.toml README.md LICENSE ./
# What pyproject.toml asks for, alone in a file: the layers of the dependencies change only when it does.
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*p['dependencies'], *p['optional-dependencies']['platform'], sep='\n')" > requirements.txt \
    && pip install --no-cache-dir -c constraints.txt hatchling
COPY platform platform
COPY jobs jobs
COPY serve_apps serve_apps
COPY tune_spaces tune_spaces
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .


FROM python:3.11-slim-bookworm

# cpu | cuda. The registry's torch brings CUDA (6 GB unpacked); its CPU build comes from an index of its own.
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1

# wget: this image's health check and the probes that KubeRay adds to its pods. The base's archive has one version of it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 --user-group meanet

WORKDIR /app
COPY constraints.txt ./

# From the largest and most lasting to the smallest: a push after a change of code sends the last layers alone.
RUN pip install -c constraints.txt --upgrade pip setuptools \
    && case "$TORCH" in \
        cpu) pip install -c constraints.txt --no-deps --index-url "$TORCH_INDEX" torch torchvision ;; \
        cuda) pip install -c constraints.txt torch torchvision ;; \
        *) echo "TORCH is '$TORCH': give --build-arg TORCH=cpu or TORCH=cuda" >&2; exit 1 ;; \
    esac
COPY --from=wheel /src/requirements.txt ./
RUN pip install -c constraints.txt -r requirements.txt && pip check
COPY --from=wheel /wheels /wheels
RUN pip install --no-deps --no-index /wheels/*.whl && mkdir outputs && chown meanet:meanet outputs
COPY --chmod=755 container/entrypoint.sh /usr/local/bin/meanet

# Token authentication is never off; the token itself comes at run time, by file or by the cluster's secret.
# Serve's fast ingress must be chosen before Ray starts, on every node: NODES of serve_apps/ingress.py.
ENV RAY_AUTH_MODE=token \
    RAY_SERVE_ENABLE_HA_PROXY=1 \
    RAY_SERVE_THROUGHPUT_OPTIMIZED=1 \
    RAY_SERVE_HAPROXY_METRICS_ENABLED=0 \
    RAY_worker_niceness=0 \
    RAY_SERVE_METRICS_EXPORT_INTERVAL_MS=2000 \
    RAY_SERVE_CONTROL_LOOP_INTERVAL_S=0.5 \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true

# By number, so that Kubernetes can see that it is not root.
USER 1000:1000
EXPOSE 6379 8000 8265
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["meanet", "health"]
ENTRYPOINT ["meanet"]
CMD ["serve"]
