"""Ranks that are started again when some have died: ``launch/local.sh --min-np``."""
