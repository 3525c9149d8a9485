# Two images from one recipe. `cpu` is what MXNet's CPU build needs; `gpu` is the same with MXNet for CUDA 11, cuDNN 8 and
# NCCL, all of them wheels from the lock, so that it needs nothing of its base but the driver that the container runtime
# lends it. Both come through launch/setup.sh, like every other machine.
#
#   docker build --target cpu --tag horovod-gluon-job:cpu .
#   docker build --target gpu --tag horovod-gluon-job:gpu .
#
# Debian rather than python:3.11: its own Python is one that MXNet accepts, it has the data set as a package, and CUDA 11.8
# with a compiler to go with it for the build of Horovod, so that one base serves both images.
ARG BASE=debian:bookworm-slim

# --- what compiles: nothing of it reaches an image but .venv ----------------------------------------------------------

FROM ${BASE} AS build
# Versions of Debian's packages are those of its stable release, which gets nothing but fixes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/job
# What pip has downloaded would be stored in the layer, beside what it has installed.
ENV PIP_NO_CACHE_DIR=1
COPY requirements-cpu.txt requirements-gpu.txt ./
COPY launch/setup.sh launch/
COPY launch/shared/environment.sh launch/shared/

FROM build AS build-cpu
# What built Horovod and what installed it has no work left, and its debugging symbols are most of its size.
RUN { launch/setup.sh --no-data --no-dev || { cat .setup/log && exit 1; }; } \
    && .venv/bin/python -m pip check \
    && strip --strip-debug .venv/lib/python3*/site-packages/horovod/mxnet/*.so \
    && .venv/bin/python -m pip uninstall --yes cmake wheel pip

FROM build AS build-gpu
# Horovod's NCCL operations need nvcc. The driver's library that comes along lets setup.sh try the imports. Half of the
# toolkit is static libraries, of which the runtime's alone is linked.
# hadolint ignore=DL3008
RUN printf 'path-%s=/usr/lib/x86_64-linux-gnu/lib%s_static.a\n' exclude '*' include cudart >/etc/dpkg/dpkg.cfg.d/static \
    && find /etc/apt '(' -name '*.sources' -o -name '*.list' ')' \
        -exec sed -i -E 's/^(Components:|deb .*) main( .*)?$/\1 main contrib non-free/' {} + \
    && apt-get update \
    && apt-get install --yes --no-install-recommends nvidia-cuda-toolkit \
    && rm -rf /var/lib/apt/lists/*
RUN { launch/setup.sh --gpu --no-data || { cat .setup/log && exit 1; }; } \
    && .venv/bin/python -m pip check \
    && strip --strip-debug .venv/lib/python3*/site-packages/horovod/mxnet/*.so \
    && .venv/bin/python -m pip uninstall --yes cmake wheel pip

# --- what runs: all of an image but the packages and the code ---------------------------------------------------------

FROM ${BASE} AS run
# The host keys that the package of sshd makes would be known to whoever has the image. No file needs setuid: nothing here
# becomes another user.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        dataset-fashion-mnist libgomp1 libquadmath0 openssh-client openssh-server python3 tini \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*_key* \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} + \
    && groupadd --gid 1000 mpiuser \
    && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash mpiuser \
    && install --directory --owner mpiuser --group mpiuser /runs \
    && mkdir /opt/job \
    && ln -s /runs /opt/job/runs
# For the MPI operator: sshd as this user, on a port of its own, and what ssh between pods needs.
COPY launch/kubernetes/sshd_config /home/mpiuser/.sshd_config
COPY launch/kubernetes/ssh_config /etc/ssh/ssh_config.d/job.conf
WORKDIR /opt/job
ENV PATH=/opt/job/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

# A container is one run: it ends with an exit code that says how it went, and a rank that is stuck is ended by the job
# itself (run.step_timeout_seconds). There is no state "runs, but is not healthy" for an engine to look for.
HEALTHCHECK NONE
# tini as process 1: it passes on a signal from the first moment, to whatever command is run, and buries orphans. SIGTERM
# reaches launch/local.sh so, and the run ends with a checkpoint and exit code 75.
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--"]
CMD ["launch/local.sh", "run.dir=/runs/fashion_mnist"]

ARG SOURCE=unknown
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="horovod-gluon-job" \
      org.opencontainers.image.description="A distributed MXNet Gluon trainer over Horovod" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# What a run notes as its commit, and what launch/cluster.sh compares between hosts: there is no git here.
RUN echo "${REVISION}" >REVISION

# --- the images -------------------------------------------------------------------------------------------------------

# The packages before the code, which changes more often. Everything belongs to root; the user owns home and /runs. The
# data set is decompressed and verified into that home, so that a read-only root file system can be trained from. What
# numba compiles is for the processor that it runs on, not for the one that built the image: seconds at the start of a run,
# once where ~/.cache can be written, each time where it cannot.
FROM run AS cpu
COPY --from=build-cpu /opt/job/.venv .venv
COPY . .
USER 1000:1000
RUN ["python", "-m", "job.data"]

FROM run AS gpu
# What the NVIDIA container runtime lends: the devices, libcuda.so.1 and nvidia-smi.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/job/.venv .venv
COPY . .
USER 1000:1000
RUN ["python", "-m", "job.data"]
