# The image that clusters/kuberay.yaml names, for its heads and its workers alike.
#   docker build --tag registry.example.com/shoal:0.2.0 .                                                # GPUs
#   docker build --build-arg RAY_IMAGE=rayproject/ray:2.60.0-py311-cpu --tag shoal:0.2.0-cpu .           # without
ARG RAY_IMAGE=rayproject/ray:2.60.0-py311-gpu
FROM ${RAY_IMAGE}

# what a job of `ray job submit --working-dir .` would bring is there already: python jobs/pretrain.py ...
WORKDIR /home/ray/shoal
COPY --chown=ray:users LICENSE README.md constraints.txt pyproject.toml ./
COPY --chown=ray:users platform/ platform/
COPY --chown=ray:users jobs/ jobs/
COPY --chown=ray:users recipes/ recipes/
COPY --chown=ray:users serve_configs/ serve_configs/
COPY --chown=ray:users ui/ ui/

# the image's own Ray is the pinned one (a test compares them), so nothing of it is replaced
RUN pip install --no-cache-dir --constraint constraints.txt --editable '.[ray,ui,s3,track]'

# fails the build, not the cluster, where something is missing
RUN shoal --version && python jobs/pretrain.py --help > /dev/null
