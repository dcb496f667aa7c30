# The server on CPUs. Build: docker build -t safeside .
# For a CPU build of torch name an index that has one: --build-arg PIP_EXTRA_INDEX_URL=ADDRESS; pip reads it.
# Run, with policies, keys and the audit log in one folder that belongs to user 10001:
#   docker run --rm -p 8000:8000 -v "$PWD/deployment:/deployment" safeside
FROM python:3.12-slim-bookworm AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src ./src
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/safeside \
    && /opt/safeside/bin/pip install --no-cache-dir --constraint constraints.txt ".[serve]" "psycopg[binary]"

FROM python:3.12-slim-bookworm
RUN useradd --uid 10001 --create-home safeside
COPY --from=build /opt/safeside /opt/safeside
USER 10001
WORKDIR /deployment
ENV PATH=/opt/safeside/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
STOPSIGNAL SIGTERM
CMD ["safeside", "serve", "--base", "builtin", "--policy", "policy.yaml", "--keys", "keys.yaml", "--audit", "sqlite:///audit.db", "--host", "0.0.0.0", "--port", "8000"]
