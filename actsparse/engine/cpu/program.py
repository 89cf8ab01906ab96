"""A list of operators, run in one call: by the compiled loop, or one by one in torch."""

import ctypes
from collections.abc import Sequence
from dataclasses import fields

from torch import Tensor

from actsparse.engine.cpu import reference
from actsparse.engine.cpu.ops import KINDS, Op


class _Step(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int64), ("arguments", ctypes.c_void_p))


class Program:
    """Operators in order. Their tensors are kept alive here, and must not move.

    `handle`: the compiled operators; None runs each in torch.
    """

    def __init__(self, ops: Sequence[Op], handle: ctypes.CDLL | None) -> None:
        self.ops = tuple(ops)
        self._handle = handle
        self._arguments = [_packed(op) for op in self.ops]
        steps = [
            _Step(KINDS.index(type(op)), ctypes.cast(ctypes.byref(found), ctypes.c_void_p))
            for op, found in zip(self.ops, self._arguments, strict=True)
        ]
        self._steps = (_Step * len(steps))(*steps)

    def run(self, times: int = 1) -> None:
        """Run all operators, `times` times over."""
        if self._handle is not None:
            self._handle.actsparse_run(ctypes.addressof(self._steps), len(self._steps), times)
            return
        for _ in range(times):
            for op in self.ops:
                reference.run(op)


def _packed(op: Op) -> ctypes.Structure:
    """The C++ structure of an operator: addresses, int64 and double, in the order of its fields."""
    values, kinds = [], []
    for field in fields(op):
        value = getattr(op, field.name)
        if isinstance(value, Tensor) or value is None:
            kinds.append((field.name, ctypes.c_void_p))
            values.append(None if value is None else value.data_ptr())
        else:
            kinds.append((field.name, ctypes.c_int64 if isinstance(value, int) else ctypes.c_double))
            values.append(value)
    made = type(type(op).__name__, (ctypes.Structure,), {"_fields_": tuple(kinds)})
    return made(*values)
