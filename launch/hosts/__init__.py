"""Imported by launch/cluster.py: the hosts. Who they are, whether they are fit, and their ranks from start to end."""
