"""The figures of an evaluation, in order: adding one is a file in `figures/` and a row here."""

from actsparse.report.figures import (
    agreement,
    bases,
    by_layer,
    drift,
    frontier,
    phases,
    quality,
    speed,
    tasks,
    throughput,
    weight_bytes,
)
from actsparse.report.rows import Row
from actsparse.results import RunKind

ROWS: tuple[Row, ...] = (
    Row(
        id="frontier",
        section="frontier",
        title="Quality against speed",
        needs=RunKind.EVAL,
        metrics="ppl, speedup",
        data=frontier.data,
        draw=frontier.draw,
        caption=frontier.caption,
        how_to_read=(
            "Right is faster, down is better; the best place is the lower right corner. Each point is a plan, "
            "with bootstrap intervals. The stepped line joins the timed plans that no other timed plan beats at "
            "both. The green band is within 5 % of dense perplexity. Hollow points were not timed and stand at "
            "the speed that their unread bytes would allow at best; a triangle on the top edge lies beyond it. "
            "Grey plans are baselines."
        ),
    ),
    Row(
        id="quality",
        section="cost",
        title="Quality against sparsity",
        needs=RunKind.EVAL,
        metrics="ppl, model_bytes_frac",
        data=quality.data,
        draw=quality.draw,
        caption=quality.caption,
        how_to_read=(
            "Each line is a method, each point a plan; all start at dense. Lower is better. Grey lines are what a "
            "method must beat: the same share dropped at random, or by one static mask. Bars are bootstrap "
            "intervals over blocks. The menu changes what sparsity is counted in, which can change the order. "
            "Oracles stand where their masks would be if they were known before: they save nothing."
        ),
    ),
    Row(
        id="kl",
        section="cost",
        title="Distance from dense",
        needs=RunKind.EVAL,
        metrics="kl",
        data=agreement.kl,
        draw=agreement.draw_kl,
        caption=agreement.caption_kl,
        wide=False,
        how_to_read=(
            "The mean KL divergence of the sparse next-token distribution from the dense one. Left is closer to "
            "dense. It sees changes that perplexity averages out."
        ),
    ),
    Row(
        id="top1",
        section="cost",
        title="Agreement with dense",
        needs=RunKind.EVAL,
        metrics="top1",
        data=agreement.top1,
        draw=agreement.draw_top1,
        caption=agreement.caption_top1,
        wide=False,
        how_to_read=("How often the sparse model would pick the same token as dense, greedily. Right is better."),
    ),
    Row(
        id="rel-err",
        section="cost",
        title="Error by layer",
        needs=RunKind.EVAL,
        metrics="rel_err",
        data=by_layer.errors,
        draw=by_layer.draw_errors,
        caption=by_layer.caption_errors,
        wide=False,
        how_to_read=(
            "The relative error of each layer's MLP output (of its projections' or attention's, for plans that "
            "drop channels or heads) on dense inputs: what the mask does by itself, before errors pile up. At "
            "most twelve plans and four baselines are drawn; the table has all."
        ),
    ),
    Row(
        id="rel-err-path",
        section="cost",
        title="Error by layer on the sparse path",
        needs=RunKind.EVAL,
        metrics="rel_err_path",
        data=by_layer.path_errors,
        draw=by_layer.draw_errors,
        caption=by_layer.caption_errors,
        wide=False,
        optional=True,
        how_to_read=(
            "The same error on the inputs that the sparse model really sees, after the errors of the layers before."
        ),
    ),
    Row(
        id="kept",
        section="cost",
        title="What is kept by layer",
        needs=RunKind.EVAL,
        metrics="kept_frac",
        data=by_layer.kept,
        draw=by_layer.draw_kept,
        caption=by_layer.caption_kept,
        wide=False,
        how_to_read=(
            "The share that each plan kept in each layer, counted over the scored positions: neurons, input "
            "channels (the mean of a layer's projections) or KV groups, whichever it drops. Threshold plans "
            "spread their budget unevenly; top-k plans keep the same everywhere. At most twelve plans and "
            "four baselines are drawn; the table has all."
        ),
    ),
    Row(
        id="bases",
        section="cost",
        title="Predicted and realised sparsity",
        needs=RunKind.EVAL,
        metrics="model_bytes_frac",
        data=bases.data,
        draw=bases.draw,
        caption=bases.caption,
        wide=False,
        how_to_read=(
            "Hollow: what the fit promised. Filled: what was counted on the scored text. Bar: what the kernel "
            "that ran really skipped, nothing for an oracle. A gap between the first two means that the threshold "
            "does not transfer to this text."
        ),
    ),
    Row(
        id="drift",
        section="cost",
        title="Damage along the text",
        needs=RunKind.EVAL,
        metrics="tokens.parquet",
        data=drift.data,
        draw=drift.draw,
        caption=drift.caption,
        wide=False,
        how_to_read=(
            "The KL from dense at each position after the prompt. A rising line is a mask that goes stale as the "
            "text moves on. At most twelve plans and four baselines are drawn; the table has all."
        ),
    ),
    Row(
        id="tasks",
        section="cost",
        title="Task scores",
        needs=RunKind.EVAL,
        metrics="acc, exact_match",
        data=tasks.scores,
        draw=tasks.draw,
        caption=tasks.caption,
        made_by="actsparse evaluate --model {model} --plan griffin@0.5 --task FILE.jsonl",
        how_to_read=(
            "The share of items that each plan gets right, with its bootstrap interval over items. Multiple "
            "choice alone hides damage: look at a generation task with exact match too. A hollow mark says that "
            "no scored token was predicted from a sparse position, so the score is the dense model's."
        ),
    ),
    Row(
        id="speed",
        section="gain",
        title="Speed beside its ceiling",
        needs=RunKind.EVAL,
        metrics="speedup, ceiling",
        data=speed.data,
        draw=speed.draw,
        caption=speed.caption,
        how_to_read=(
            "The median of paired ratios dense over sparse, in one process, with its bootstrap interval; the tick "
            "is the most that the bytes not read allow. An interval that touches 1 is not significant. A point "
            "beyond its tick deserves suspicion."
        ),
    ),
    Row(
        id="phases",
        section="gain",
        title="Milliseconds by phase",
        needs=RunKind.EVAL,
        metrics="timing.parquet",
        data=phases.data,
        draw=phases.draw,
        caption=phases.caption,
        wide=False,
        how_to_read=(
            "The median time of one timed generation: dense prefill, selecting and slicing the kept neurons "
            "(sparse only), and decoding a fixed number of tokens. The model's own generate stands beside the "
            "dense engine."
        ),
    ),
    Row(
        id="bytes",
        section="gain",
        title="Bytes read a token",
        needs=RunKind.EVAL,
        metrics="bytes_mlp, bytes_attention, bytes_head",
        data=weight_bytes.data,
        draw=weight_bytes.draw,
        caption=weight_bytes.caption,
        wide=False,
        how_to_read=(
            "The weights that one decode step reads, by component. Decoding one sequence is bound by these bytes, "
            "so they set the ceiling."
        ),
    ),
    Row(
        id="throughput-batch",
        section="gain",
        title="Speed against batch size",
        needs=RunKind.EVAL,
        metrics="throughput.parquet",
        data=throughput.by_batch,
        draw=throughput.draw,
        caption=throughput.caption,
        made_by="actsparse evaluate --model {model} --plan griffin@0.5 --throughput --batch-sizes 1,2,4,8",
        wide=False,
        how_to_read=(
            "Median time of a decode step, dense over sparse, as more sequences are decoded together. Masks of "
            "different sequences differ, so what a batch needs grows with it and the gain shrinks; at 1 nothing "
            "is gained."
        ),
    ),
    Row(
        id="throughput-length",
        section="gain",
        title="Speed against length",
        needs=RunKind.EVAL,
        metrics="throughput.parquet",
        data=throughput.by_length,
        draw=throughput.draw,
        caption=throughput.caption,
        made_by="actsparse evaluate --model {model} --plan griffin@0.5 --throughput --gen-lengths 32,128,512",
        wide=False,
        how_to_read=(
            "The same over the number of generated tokens. Longer generations read more of the key-value cache, "
            "which no neuron plan makes smaller."
        ),
    ),
)
