"""The structures that the compiled kernels take, field for field as in kernels/*.cu."""

import ctypes

_FLOAT, _INT, _LONG, _POINTER = ctypes.c_float, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class RowsArgs(ctypes.Structure):
    """Mirrors `RowsArgs` in kernels/rows.cu."""

    _fields_ = (
        *(
            (name, _POINTER)
            for name in ("weight", "x", "norm", "bias", "factor", "fill", "threshold", "index", "count")
        ),
        *((name, _POINTER) for name in ("out", "best_value", "best_row", "read")),
        ("stride", _LONG),
        *((name, _FLOAT) for name in ("epsilon", "scale", "cap")),
        *((name, _INT) for name in ("second", "rows", "width", "activation", "threshold_step", "fresh")),
        *((name, _INT) for name in ("fixed_x", "fixed_out")),
    )


class Segment(ctypes.Structure):
    """Mirrors `Segment` in kernels/columns.cu."""

    _fields_ = (("begin", _INT), ("length", _INT), ("first_tile", _INT))


class ColumnsArgs(ctypes.Structure):
    """Mirrors `ColumnsArgs` in kernels/columns.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "x", "up", "norm", "squares", "score", "threshold", "index")),
        *((name, _POINTER) for name in ("count", "bias", "fill", "out", "partial", "arrived", "zero", "read")),
        ("stride", _LONG),
        ("epsilon", _FLOAT),
        *((name, _INT) for name in ("inputs", "outputs", "slices", "segments", "activation", "epilogue")),
        ("squares_count", _INT),
        ("scale", _FLOAT),
        *((name, _INT) for name in ("ahead", "later", "fresh", "invert", "keeps_nan", "fixed", "zeros")),
        ("segment", Segment * 3),
    )


class BatchRowsArgs(ctypes.Structure):
    """Mirrors `BatchRowsArgs` in kernels/batch_rows.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "x", "bias", "factor", "threshold", "mask", "count", "out")),
        *((name, _POINTER) for name in ("best_value", "best_row", "read")),
        *((name, _LONG) for name in ("stride", "x_stride", "out_stride", "factor_stride", "mask_stride")),
        *((name, _FLOAT) for name in ("scale", "cap")),
        *((name, _INT) for name in ("batch", "second", "rows", "width", "activation", "threshold_step")),
    )


class BatchColumnsArgs(ctypes.Structure):
    """Mirrors `BatchColumnsArgs` in kernels/batch_columns.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "x", "up", "score", "threshold", "count", "bias", "out", "zero")),
        ("read", _POINTER),
        *((name, _LONG) for name in ("stride", "x_stride", "out_stride")),
        ("scale", _FLOAT),
        *((name, _INT) for name in ("batch", "inputs", "outputs", "slices", "segments", "activation")),
        *((name, _INT) for name in ("ahead", "fixed", "zeros")),
        ("segment", Segment * 3),
    )


class AttendArgs(ctypes.Structure):
    """Mirrors `AttendArgs` in kernels/attention.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("qkv", "cosine", "sine", "keys", "values", "position", "padding", "out")),
        *((name, _POINTER) for name in ("q_norm", "k_norm", "groups")),
        *((name, _FLOAT) for name in ("scale", "cap", "inverse_cap", "epsilon")),
        *((name, _INT) for name in ("half", "window", "heads", "kv_heads", "positions", "splits", "batch", "fixed")),
    )


class TokenArgs(ctypes.Structure):
    """Mirrors `TokenArgs` in kernels/token.cu."""

    _fields_ = (
        *(
            (name, _POINTER)
            for name in ("best_value", "best_row", "forced", "tokens", "position", "embedding", "hidden", "squares")
        ),
        ("stride", _LONG),
        ("embed_scale", _FLOAT),
        *((name, _INT) for name in ("candidates", "positions", "width", "batch")),
    )


class PostNormArgs(ctypes.Structure):
    """Mirrors `PostNormArgs` in kernels/token.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("branch", "weight", "hidden", "squares")),
        *((name, _FLOAT) for name in ("epsilon", "scale")),
        *((name, _INT) for name in ("width", "fixed")),
    )


class NormArgs(ctypes.Structure):
    """Mirrors `NormArgs` in kernels/token.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "weight", "out")),
        ("epsilon", _FLOAT),
        *((name, _INT) for name in ("width", "fixed")),
    )


class FixArgs(ctypes.Structure):
    """Mirrors `FixArgs` in kernels/token.cu."""

    _fields_ = (("values", _POINTER), ("sums", _POINTER), ("size", _INT))


class GatherArgs(ctypes.Structure):
    """Mirrors `GatherArgs` in kernels/token.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("source", "target", "index", "count")),
        ("rows", _LONG),
        *((name, _INT) for name in ("capacity", "parts", "quads")),
    )


class TopArgs(ctypes.Structure):
    """Mirrors `TopArgs` in kernels/choices.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "up", "norm", "score", "threshold")),
        ("epsilon", _FLOAT),
        *((name, _INT) for name in ("inputs", "activation", "fixed", "rules")),
        ("top", _INT * 3),
    )


class ScoresArgs(ctypes.Structure):
    """Mirrors `ScoresArgs` in kernels/choices.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("weight", "x", "norm", "out")),
        ("epsilon", _FLOAT),
        *((name, _INT) for name in ("rows", "width", "tanh", "fixed")),
    )


class ChooseArgs(ctypes.Structure):
    """Mirrors `ChooseArgs` in kernels/choices.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("score", "sizes", "members", "always", "index", "count", "mask")),
        *((name, _INT) for name in ("units", "each", "top", "neurons")),
    )


class MergeArgs(ctypes.Structure):
    """Mirrors `MergeArgs` in kernels/choices.cu."""

    _fields_ = (
        *((name, _POINTER) for name in ("gate", "up", "out")),
        *((name, _INT) for name in ("activation", "size")),
    )
