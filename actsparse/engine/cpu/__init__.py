"""Fast decode on CPUs: a dense step and the sparse steps that do not read the weights they skip."""
