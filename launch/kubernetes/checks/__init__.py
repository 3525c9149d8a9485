"""What launch/kubernetes/validate.py checks, in layers: how manifests are read, the objects, this job."""
