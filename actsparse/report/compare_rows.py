"""The figures that hold several models at once: they exist where a report compares runs."""

from actsparse.report.figures import together
from actsparse.report.rows import Row
from actsparse.results import RunKind

ROWS: tuple[Row, ...] = (
    Row(
        id="together-sparsity",
        section="compare",
        title="Sparsity at equal CETT, models together",
        needs=RunKind.PROFILE,
        metrics="cett_sparsity",
        data=together.sparsity,
        draw=together.draw_sparsity,
        caption=together.caption_sparsity,
        together=True,
        optional=True,
        how_to_read=(
            "The share of neurons that can be dropped at one and the same error of the MLP output, for every "
            "model, over relative depth, since models differ in layers. Higher is sparser. Equal error, so the "
            "lines compare."
        ),
    ),
    Row(
        id="together-quality",
        section="compare",
        title="Quality kept against bytes, models together",
        needs=RunKind.EVAL,
        metrics="ppl, model_bytes_frac",
        data=together.quality,
        draw=together.draw_quality,
        caption=together.caption_quality,
        together=True,
        optional=True,
        how_to_read=(
            "Perplexity over each model's own dense perplexity, which compares between models where perplexities "
            "do not. A colour is a method, a dash a model; only methods that both models ran are drawn."
        ),
    ),
)
