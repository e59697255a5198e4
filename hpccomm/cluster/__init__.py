"""A virtual cluster: several nodes on one machine, made of network namespaces, and a real Slurm on them."""
