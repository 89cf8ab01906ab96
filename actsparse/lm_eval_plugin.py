"""Makes `lm_eval --model actsparse` work: lm-eval has no way to find models of other packages by itself.

The wheel carries `actsparse-lm-eval.pth` and the module that it imports, `actsparse_lm_eval`: a finder that waits for
lm-eval to import its models and then calls `register`. Where such files are not read (`PYTHONPATH`, an editable
installation), `python -m actsparse.lm_eval_plugin` is lm-eval's own command with the model added.
"""

TARGET = "actsparse.pipelines.harness:ActsparseLM"


def register() -> None:
    """Add the model `actsparse` to lm-eval's registry; it is imported when it is asked for."""
    from lm_eval.api.registry import model_registry

    if "actsparse" not in model_registry:
        model_registry.register("actsparse", target=TARGET)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()
