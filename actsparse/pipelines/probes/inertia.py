"""The probe `inertia`: overlaps and SI2 on the input ladder, SI1, SI3, the 2x2 (methods.md section 6)."""

from actsparse.pipelines.probes.long_sequences import add_si1_and_si3
from actsparse.pipelines.probes.rungs import add_si2
from actsparse.pipelines.probes.sentences import add_2x2
from actsparse.pipelines.probes.setting import Found, Setting


def inertia(setting: Setting) -> Found:
    """Whether masks of one text stay alike, and whether that needs meaning."""
    found = Found(setting.layers)
    add_si2(setting, found)
    add_si1_and_si3(setting, found)
    add_2x2(setting, found)
    return found
