"""The shape of a model's attention, read from its configuration."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """Hidden size, query heads, key-value heads (KV groups) and the width of a head."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group_width(self) -> int:
        """How wide a KV group is in the concatenated heads."""
        return self.head_dim * self.heads // self.kv_heads


def shape_of(config: object) -> HeadShape:
    """The shape that a configuration names."""
    heads = first_int(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
    hidden = first_int(config, "hidden_size", "n_embd", "d_model")
    return HeadShape(
        hidden=hidden,
        heads=heads,
        kv_heads=_kv_heads(config, heads),
        head_dim=optional_int(config, "head_dim") or hidden // heads,
    )


def first_int(config: object, *names: str) -> int:
    """The first of these settings that is a number; raises AttributeError where there is none."""
    found = optional_int(config, *names)
    if found is None:
        raise AttributeError(f"the configuration has none of {names}")
    return found


def optional_int(config: object, *names: str) -> int | None:
    """The first of these settings that is a number, or None."""
    return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)


def _kv_heads(config: object, heads: int) -> int:
    """Key-value heads; Falcon's multi-query models have one, whatever `num_kv_heads` says."""
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return 1
    return optional_int(config, "num_key_value_heads", "num_kv_heads") or heads
