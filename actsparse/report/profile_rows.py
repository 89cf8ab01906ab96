"""The figures of a profile, in order: adding one is a file in `figures/` and a row here."""

from actsparse.report.figures import (
    cett,
    coactivation,
    decode_phase,
    firing,
    head_maps,
    kind_maps,
    magnitudes,
    positions,
    routing,
)
from actsparse.report.rows import Row
from actsparse.results import RunKind

ROWS: tuple[Row, ...] = (
    Row(
        id="kind-sparsity",
        section="sparse",
        title="Sparsity by layer and kind",
        needs=RunKind.PROFILE,
        metrics="histograms",
        data=kind_maps.sparsity,
        draw=kind_maps.draw_sparsity,
        caption=kind_maps.caption_sparsity,
        how_to_read=(
            "One measure for every place where activations are read, so that they compare: the share of the smallest "
            "values that can be set to zero before the activation itself is off by 20 % of its norm (they hold 4 % of "
            "its energy), over all tokens of a layer. Dark is sparse; a Gaussian gives 42 %. The menu changes what "
            "counts as sparse: a smaller error, nearly zero beside the root mean square, exact zeros. It is not CETT, "
            "which weighs neurons by the columns they are multiplied with. Our own definition."
        ),
    ),
    Row(
        id="kind-zeros",
        section="sparse",
        title="Exact zeros by layer and kind",
        needs=RunKind.PROFILE,
        metrics="zero_frac",
        data=kind_maps.zeros,
        draw=kind_maps.draw_zeros,
        caption=kind_maps.caption_zeros,
        optional=True,
        how_to_read=(
            "The share of activations that are exactly zero, as ReLU makes them. These can be skipped without any "
            "error."
        ),
    ),
    Row(
        id="cett-layers",
        section="sparse",
        title="CETT sparsity by layer",
        needs=RunKind.PROFILE,
        metrics="cett_sparsity",
        data=cett.layers,
        draw=cett.draw_layers,
        caption=cett.caption_layers,
        wide=False,
        how_to_read=(
            "For each layer, the share of neurons whose output can be dropped token by token until the mean "
            "relative error of the MLP output (CETT) reaches the target. Higher is sparser. It is a ruler: the "
            "mask needs the neurons' values, so it is no speed-up."
        ),
    ),
    Row(
        id="decode-phase",
        section="sparse",
        title="Prompt and own tokens",
        needs=RunKind.PROFILE,
        metrics="cett_sparsity, phase=decode",
        data=decode_phase.sparsity,
        draw=decode_phase.draw,
        caption=decode_phase.caption,
        made_by="actsparse profile --model {model} --decode 64",
        wide=False,
        how_to_read=(
            "The same sparsity over the prompts and over what the model writes after them. Thresholds and masks "
            "are fitted on given text and used on the model's own: where the lines part, they do not transfer."
        ),
    ),
    Row(
        id="cett-curve",
        section="sparse",
        title="CETT as sparsity grows",
        needs=RunKind.PROFILE,
        metrics="cett_curve",
        data=cett.curve,
        draw=cett.draw_curve,
        caption=cett.caption_curve,
        wide=False,
        how_to_read=(
            "How the error of the MLP output grows as more of its smallest neurons are dropped. A curve that "
            "stays flat for long and rises late is a sparse layer. Named layers are in colour, the others faint."
        ),
    ),
    Row(
        id="magnitudes-neuron",
        section="sparse",
        title="Magnitudes of neurons",
        needs=RunKind.PROFILE,
        metrics="histograms",
        data=magnitudes.neurons,
        draw=magnitudes.draw,
        caption=magnitudes.caption,
        wide=False,
        how_to_read=(
            "The distribution of absolute activations at the input of the down projection, on a log axis; the "
            "height is the share of values within 1/12 decade. A long left tail is what thresholds can cut. Exact "
            "zeros are left out."
        ),
    ),
    Row(
        id="magnitudes-gate",
        section="sparse",
        title="Magnitudes of gates",
        needs=RunKind.PROFILE,
        metrics="histograms",
        data=magnitudes.gates,
        draw=magnitudes.draw,
        caption=magnitudes.caption,
        wide=False,
        optional=True,
        how_to_read=(
            "The distribution of |act(gate)|, on a log axis; the height is the share of values within 1/12 "
            "decade. Dashed lines are the thresholds of a plan that gates on this value: what lies left of them "
            "is skipped."
        ),
    ),
    Row(
        id="position-sparsity",
        section="sparse",
        title="Sparsity by position",
        needs=RunKind.PROFILE,
        metrics="position_sparsity",
        not_of_experts="a threshold of one expert says nothing of another's neurons",
        data=positions.sparsity,
        draw=positions.draw_sparsity,
        caption=positions.caption_sparsity,
        wide=False,
        how_to_read=(
            "The share of neurons whose output is under the layer's threshold at CETT 0.2, at a range of token "
            "positions. A line that drifts means that a threshold fitted on short prompts fits long ones badly."
        ),
    ),
    Row(
        id="position-rms",
        section="sparse",
        title="Activation size by position",
        needs=RunKind.PROFILE,
        metrics="position_rms",
        not_of_experts="each position is served by experts of its own",
        data=positions.rms,
        draw=positions.draw_rms,
        caption=positions.caption_rms,
        wide=False,
        how_to_read=(
            "The root mean square of neurons at a range of token positions, over the layer's mean of all ranges. "
            "A line at 1 does not depend on position. Sink positions are left out of all statistics."
        ),
    ),
    Row(
        id="position-zeros",
        section="sparse",
        title="Exact zeros by position",
        needs=RunKind.PROFILE,
        metrics="position_zero_frac",
        data=positions.zeros,
        draw=positions.draw_zeros,
        caption=positions.caption_zeros,
        wide=False,
        optional=True,
        how_to_read=("The share of neurons that are exactly zero at a range of token positions."),
    ),
    Row(
        id="firing-rates",
        section="neurons",
        title="Firing rates, sorted",
        needs=RunKind.PROFILE,
        metrics="neurons.parquet",
        data=firing.rates,
        draw=firing.draw_rates,
        caption=firing.caption_rates,
        wide=False,
        how_to_read=(
            "How often each neuron is in its layer's top 20 % by |a|·‖w‖, sorted. If all fired alike, the line "
            "would be flat at 20 %; a steep start is a hot set that a static mask would keep as well. The Gini "
            "coefficient says how unequal it is."
        ),
    ),
    Row(
        id="firing-shares",
        section="neurons",
        title="Gini, hot and dead by layer",
        needs=RunKind.PROFILE,
        metrics="neuron_gini, hot_frac, dead_frac",
        data=firing.shares,
        draw=firing.draw_shares,
        caption=firing.caption_shares,
        wide=False,
        how_to_read=(
            "Hot neurons are active in over half of the tokens, dead ones in under 0.1 %. A Gini coefficient of 0 "
            "means that all neurons are active equally often, 1 that a single one is."
        ),
    ),
    Row(
        id="expert-loads",
        section="neurons",
        title="Where tokens are routed",
        needs=RunKind.PROFILE,
        metrics="expert_frac",
        data=routing.loads,
        draw=routing.draw_loads,
        caption=routing.caption_loads,
        optional=True,
        how_to_read=(
            "The share of tokens that the router of each layer sends to each expert. A layer's shares add up to "
            "the experts that a token takes. Dark rows are experts that much of the text goes through; pale ones "
            "hold weights that this text hardly reads."
        ),
    ),
    Row(
        id="expert-sparsity",
        section="neurons",
        title="How sparse each expert is",
        needs=RunKind.PROFILE,
        metrics="expert_cett_sparsity",
        data=routing.sparsities,
        draw=routing.draw_sparsities,
        caption=routing.caption_sparsities,
        optional=True,
        how_to_read=(
            "As CETT sparsity by layer, for each routed expert over the tokens that it serves, relative to its own "
            "output: the share of its neurons that can be dropped token by token until its output is off by 20 %. The "
            "colours span the experts at hand. Experts that serve few tokens rest on few: the numbers say on how many."
        ),
    ),
    Row(
        id="router-entropy",
        section="neurons",
        title="How sure the router is",
        needs=RunKind.PROFILE,
        metrics="router_entropy",
        data=routing.entropies,
        draw=routing.draw_entropies,
        caption=routing.caption_entropies,
        optional=True,
        wide=False,
        how_to_read=(
            "The mean entropy of the router's probabilities: 0, one expert takes all; at the line, all experts "
            "are alike."
        ),
    ),
    Row(
        id="coactivation",
        section="neurons",
        title="Which hot neurons fire together",
        needs=RunKind.PROFILE,
        metrics="coactivation.safetensors",
        not_of_experts="it is solved expert by expert, see expert_coactivation_phi in the tables",
        data=coactivation.correlations,
        draw=coactivation.draw,
        caption=coactivation.caption,
        wide=False,
        how_to_read=(
            "Correlation (phi) of the firing of two neurons, among those of a layer that fire most. Orange: they "
            "fire together more than their rates explain; blue: one fires when the other does not; pale: "
            "independent. Blocks are groups of neurons that a router could switch as one. Our own definition."
        ),
    ),
    Row(
        id="heads",
        section="neurons",
        title="Attention heads",
        needs=RunKind.PROFILE,
        metrics="heads.parquet",
        data=head_maps.heads,
        draw=head_maps.draw,
        caption=head_maps.caption,
        wide=False,
        how_to_read=(
            "The output norm of each head over an equal share of its layer's total. 1 is average, dark heads "
            "write most into the residual stream, pale ones little. Values of 3 and more share a colour."
        ),
    ),
    Row(
        id="groups",
        section="neurons",
        title="KV groups",
        needs=RunKind.PROFILE,
        metrics="heads.parquet",
        data=head_maps.groups,
        draw=head_maps.draw,
        caption=head_maps.caption,
        wide=False,
        optional=True,
        how_to_read=(
            "As for heads, by group of heads that share keys and values: the unit that can be skipped on this model."
        ),
    ),
)
