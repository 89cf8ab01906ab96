"""Texts: prompts, corpora and how they are cut into token sequences."""
