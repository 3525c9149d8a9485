"""Run by nobody: the job on Kubernetes: manifests, what runs in the pods, and what checks it without a cluster."""
