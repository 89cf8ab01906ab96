"""The probe `uncertainty`: HU1 with all its controls, and HU2 (methods.md section 5)."""

from actsparse.pipelines.probes.histories import add_hu1
from actsparse.pipelines.probes.setting import Found, Setting
from actsparse.pipelines.probes.token_information import add_hu2


def uncertainty(setting: Setting) -> Found:
    """How far the token alone decides which neurons fire."""
    found = Found(setting.layers)
    add_hu1(setting, found)
    add_hu2(setting, found)
    return found
