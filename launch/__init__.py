"""Ways to start the trainer: on this machine; Slurm and Kubernetes build on it."""
