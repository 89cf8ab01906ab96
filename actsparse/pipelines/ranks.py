"""Which process of a team this is, as `torchrun` tells it; without torch, so that the command line can ask at once."""

import os


def rank() -> int:
    """This process's number; 0 without a team."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def size() -> int:
    """How many processes work together; 1 without a team."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this process speaks for its team."""
    return rank() == 0
