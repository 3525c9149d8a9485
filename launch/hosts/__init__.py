"""The hosts of launch/cluster.sh: who they are, whether they are fit, and their ranks from start to end."""
