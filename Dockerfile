# One image for every process: migrate, worker, beat, the command line.
# torch's wheels bring CUDA along; the host needs the NVIDIA driver and its container toolkit only.
FROM python:3.12-slim-bookworm

# g++ builds the CPU kernels at a worker's first start.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ tini \
    && rm -rf /var/lib/apt/lists/*

# A user of its own; its data folder is a volume.
RUN useradd --uid 10001 --user-group --create-home --shell /usr/sbin/nologin nightherd \
    && install --directory --owner nightherd --group nightherd --mode 700 /var/lib/nightherd

WORKDIR /opt/nightherd

# The dependencies in a layer of their own: some gigabytes that a change of the code leaves alone.
# An index of torch without CUDA makes a far smaller image for the CPU (see .env.example).
ARG PIP_EXTRA_INDEX_URL=
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*p['dependencies'], *p['optional-dependencies']['worker'], sep='\n')" > requirements.txt \
    && pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt

COPY README.md LICENSE ./
COPY nightherd nightherd
COPY models models
COPY migrations migrations
COPY producer producer
COPY worker worker
RUN pip install --no-cache-dir --no-deps '.[worker]'

USER nightherd
WORKDIR /var/lib/nightherd
ENV NIGHTHERD_HOME=/var/lib/nightherd \
    NIGHTHERD_CACHE=/var/lib/nightherd/cache \
    HF_HOME=/var/lib/nightherd/huggingface \
    PYTHONUNBUFFERED=1
VOLUME /var/lib/nightherd

# tini reaps what a killed process leaves behind and hands SIGTERM on: the worker then drains.
ENTRYPOINT ["tini", "--", "nightherd"]
CMD ["--help"]
