"""Fast batch-1 decode on NVIDIA GPUs: a dense step and the sparse steps that do not read the weights they skip."""
