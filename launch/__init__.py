"""Run by nobody: the package of all that starts the job, on one machine, on several, under a scheduler."""
