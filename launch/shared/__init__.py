"""Run by nobody: what several launchers share."""
