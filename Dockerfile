# Everything but the driver:
#   docker build --build-arg COMMIT="$(git rev-parse HEAD)" -t registry.example.com/spattn_olmoe:0.1.0 .
# For a build that cannot change, name the base by its digest: --build-arg BASE=nvidia/cuda@sha256:...
ARG BASE=nvidia/cuda:13.0.1-base-ubuntu24.04
# hadolint ignore=DL3006
FROM ${BASE}
ARG PYTHON=python3.12

# Triton compiles a small C file at run time, which takes a compiler and Python's headers. tini is the first process: it
# passes signals on and buries the processes that torchrun's workers leave behind.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev ${PYTHON} ${PYTHON}-dev ${PYTHON}-venv tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 spattn \
    && useradd --uid 10001 --gid spattn --create-home spattn \
    && install --directory --owner=spattn --group=spattn /opt/venv /srv/spattn /srv/spattn/data /srv/spattn/runs

USER 10001:10001
WORKDIR /srv/spattn
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

# The packages change less often than the code: a layer of their own.
COPY --chown=10001:10001 pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=10001:10001 spattn_olmoe/__init__.py spattn_olmoe/__init__.py
RUN ${PYTHON} -m venv /opt/venv \
    && python -m pip install --no-cache-dir --constraint constraints.txt --editable ".[wandb,eval]"

COPY --chown=10001:10001 spattn_olmoe spattn_olmoe
COPY --chown=10001:10001 scripts scripts
COPY --chown=10001:10001 configs configs

# Without git in the image this is how results know their commit. Last, so that a new commit rebuilds no layer.
ARG COMMIT=
LABEL org.opencontainers.image.revision=${COMMIT} org.opencontainers.image.licenses=Apache-2.0
ENV SPATTN_COMMIT=${COMMIT}

ENTRYPOINT ["tini", "--"]
CMD ["python", "scripts/check_env.py", "--config", "configs/1b7b_spattn.yaml"]
