"""The errors that people see: what happened, to which object, and what to do about it.

Raise one where the fact is known; `cli.app.main` is the one place that catches them.
"""


class ActsparseError(Exception):
    """A failure that a person can act on, with the hint that says how.

    `what` names the object and the fact; `hint` is one line that can be pasted or followed;
    `exit_code` is what the command line returns.
    """

    exit_code = 1

    def __init__(self, what: str, hint: str = "", *, exit_code: int | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.what}\nhint: {self.hint}" if self.hint else self.what


class ModelError(ActsparseError):
    """A model or tokenizer that cannot be loaded or served."""


class DataError(ActsparseError):
    """Prompts, a corpus or a data set that cannot be read as asked."""


class RunError(ActsparseError):
    """A run directory that cannot be read, written or resumed."""


class PlanError(ActsparseError):
    """A method, an option or a plan that cannot be used as asked."""


class QualityGateMissed(ActsparseError):
    """The evaluation ran, and a plan missed the quality that was asked of it."""

    exit_code = 3


NO_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "bad_alloc",
    "status_alloc_failed", "allocation_failed",  # cuBLAS and its kin; cuDNN since version 9
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice: Python's, torch's on any device, or the system's."""
    if isinstance(error, ActsparseError):
        return False
    said = str(error).lower()
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(words in said for words in NO_MEMORY)


def reason_of(error: BaseException) -> str:
    """What a library said in one line: the first, and the second where the first announces it (`Validation error:`)."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError) and lines:
        return f"{lines[0]} is not known"
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__
