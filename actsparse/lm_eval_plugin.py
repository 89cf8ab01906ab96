"""Makes `lm_eval --model actsparse` work: lm-eval has no way to find models of other packages by itself.

The wheel carries `actsparse-lm-eval.pth`, one line that Python runs at its start: it waits, at no cost, for lm-eval to
import its models, and then calls `register`. Where such files are not read, `python -m actsparse.lm_eval_plugin` is
lm-eval's own command with the model added.
"""

import sys

TARGET = "actsparse.pipelines.harness:ActsparseLM"


def register(finder: type | None = None) -> None:
    """Add the model `actsparse` to lm-eval's registry, imported when it is asked for; the waiting `finder` goes."""
    if finder in sys.meta_path:
        sys.meta_path.remove(finder)  # pyright: ignore[reportArgumentType]
    from lm_eval.api.registry import model_registry

    if "actsparse" not in model_registry:
        model_registry.register("actsparse", target=TARGET)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()
