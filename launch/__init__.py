"""Starting the job: on one machine, on several, under a scheduler."""
