"""Imported by validate.py: what it checks, in layers: how manifests are read, the objects, this job."""
