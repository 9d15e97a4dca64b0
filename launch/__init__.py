"""Ways to start the trainer: on this machine, and on it Slurm and Kubernetes."""
