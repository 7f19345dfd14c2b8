# The image of docs/kuberay.yaml: docker build -f docs/kuberay.Dockerfile -t REGISTRY/cdm:TAG .
FROM python:3.12-slim-bookworm
# wget: KubeRay's probes; gcc: kernels that are compiled on the node
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev wget && rm -rf /var/lib/apt/lists/*
WORKDIR /home/ray/cdm
COPY requirements requirements
RUN pip install --no-cache-dir --no-deps -r requirements/gpu.txt
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .
