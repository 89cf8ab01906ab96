"""The papers' experiments (methods.md, section 8), one file each; `run.py` runs a study and writes its tables."""
