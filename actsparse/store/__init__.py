"""Run directories: manifest, tables, tensors. The only package that writes results to disk."""
