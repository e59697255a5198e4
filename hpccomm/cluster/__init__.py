"""Several nodes on one machine, made of network namespaces, and a real Slurm on them."""
