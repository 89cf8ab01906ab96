"""Work without a network: the libraries that fetch models, data sets and metrics are told so while it lasts."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants

# what each library decides by, read from the environment once, when it is imported
DATASETS, METRICS = ("datasets.config", "HF_HUB_OFFLINE"), ("evaluate.config", "HF_EVALUATE_OFFLINE")
TOLD = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}


@contextmanager
def network(*, offline: bool) -> Iterator[None]:
    """While the block runs with `offline`, hub, data sets and metrics come from caches alone; afterwards as before."""
    if not offline:
        yield
        return
    environment = {name: os.environ.get(name) for name in TOLD}
    hub, libraries = constants.HF_HUB_OFFLINE, {place: _switch(place) for place in (DATASETS, METRICS)}
    constants.HF_HUB_OFFLINE = True
    os.environ.update(TOLD)
    for (module, name), before in libraries.items():
        if before is not None:
            setattr(sys.modules[module], name, True)
    try:
        yield
    finally:
        for name, value in environment.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        constants.HF_HUB_OFFLINE = hub
        for (module, name), before in libraries.items():
            if module in sys.modules:
                # imported meanwhile: it took what held then for good
                setattr(sys.modules[module], name, hub if before is None else before)


def is_offline() -> bool:
    """Whether nothing may be fetched now: by `network`, or by the environment of this process."""
    return constants.is_offline_mode()


def _switch(place: tuple[str, str]) -> bool | None:
    """A library's switch; None where it is not imported."""
    module, name = place
    return getattr(sys.modules[module], name) if module in sys.modules else None
