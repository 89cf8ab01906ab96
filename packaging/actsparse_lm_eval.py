"""Imported by `actsparse-lm-eval.pth` when Python starts: waits for lm-eval to import its models, then adds one.

lm-eval has a fixed table of models and no entry points, so this is the only way in which `lm_eval --model actsparse`
can work. Nothing else happens at the start, nothing of actsparse is imported before `lm_eval.models` is, and whatever
goes wrong leaves lm-eval as it is, with one line on stderr.
"""

import sys


class ActsparseForLmEval:
    """A finder that finds nothing: it sees the name of a module before it is imported."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> None:
        """Add the model when lm-eval imports its own, then step aside."""
        del path, target
        if name != "lm_eval.models":
            return
        sys.meta_path.remove(cls)  # pyright: ignore[reportArgumentType]
        try:
            from actsparse.lm_eval_plugin import register

            register()
        except Exception as error:
            sys.stderr.write(f"actsparse: its model was not added to lm-eval: {error}\n")


sys.meta_path.insert(0, ActsparseForLmEval)  # pyright: ignore[reportArgumentType]
