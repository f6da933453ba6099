# One image for head, worker and job: the same pins as the Makefile's. CPU and GPU: the registry's torch brings CUDA.
#   docker build -t meanet .
#   docker run --rm --shm-size=1g meanet python -m jobs.demo digits
FROM python:3.11-slim

RUN useradd --create-home --uid 1000 meanet
WORKDIR /app

# The dependencies first: this layer changes only when the pins do.
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN mkdir -p platform/meanet jobs serve_apps tune_spaces \
    && touch platform/meanet/__init__.py jobs/__init__.py serve_apps/__init__.py tune_spaces/__init__.py \
    && pip install --no-cache-dir -c constraints.txt --upgrade pip setuptools \
    && pip install --no-cache-dir -c constraints.txt hatchling editables \
    && pip install --no-cache-dir -c constraints.txt -e '.[platform]'

COPY platform platform
COPY jobs jobs
COPY serve_apps serve_apps
COPY tune_spaces tune_spaces
RUN mkdir outputs && chown meanet outputs

USER meanet
ENV MLFLOW_DISABLE_TELEMETRY=true RAY_USAGE_STATS_ENABLED=0
EXPOSE 8000
CMD ["python", "-m", "serve_apps", "--host", "0.0.0.0"]
