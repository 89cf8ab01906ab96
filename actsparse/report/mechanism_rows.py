"""The figures of the two mechanisms, uncertainty and inertia, in order: what `profile --probes` measures."""

from actsparse.report.figures import batch_union, distance, gradients, histories, ladder, prefix, sentences, variance
from actsparse.report.rows import Row
from actsparse.results import RunKind

UNCERTAINTY = "actsparse profile --model {model} --probes uncertainty"
INERTIA = "actsparse profile --model {model} --probes inertia"
GRADIENTS = "actsparse profile --model {model} --gradients"
UNION = "actsparse profile --model {model} --probes union"

ROWS: tuple[Row, ...] = (
    Row(
        id="overlap-distance",
        section="mechanisms",
        title="Overlap against distance",
        needs=RunKind.PROFILE,
        metrics="overlap_distance",
        data=distance.overlaps,
        draw=distance.draw,
        caption=distance.caption,
        made_by=INERTIA,
        wide=False,
        how_to_read=(
            "How many of the kept neurons two tokens of one text share, by how far apart they are. Grey lines are "
            "what chance gives: dotted, were all neurons alike; dashed, were each neuron on as often as it is, "
            "but at random. What lies on the dashed line is a static hot set and no inertia."
        ),
    ),
    Row(
        id="ladder",
        section="mechanisms",
        title="Overlap on the input ladder",
        needs=RunKind.PROFILE,
        metrics="overlap_w, overlap_b, e_pop",
        data=ladder.overlaps,
        draw=ladder.draw_overlaps,
        caption=ladder.caption_overlaps,
        made_by=INERTIA,
        how_to_read=(
            "From left to right the input loses meaning: sentences shuffled, tokens shuffled, tokens drawn by "
            "frequency, tokens drawn evenly, one token repeated (whose pairs of different tokens do not exist). "
            "Thin lines are the chance levels: grey where one holds for all pairs, in the colour of the pairs where "
            "each kind has its own (sharing more experts is reason enough to overlap). If overlap needed meaning, the "
            "lines would fall to the right; a "
            "gap between same and other sequence is what a mask for one sequence can win. Bars are bootstrap "
            "intervals over sequences. Our own definition, after MOYU and CLADA."
        ),
    ),
    Row(
        id="ladder-excess",
        section="mechanisms",
        title="SI2: does a text's own mask hold?",
        needs=RunKind.PROFILE,
        metrics="si2_j, sir",
        data=ladder.excess,
        draw=ladder.draw_excess,
        caption=ladder.caption_excess,
        made_by=INERTIA,
        wide=False,
        how_to_read=(
            "J is the overlap within a sequence less that between sequences, each above its chance level: how "
            "much more a text's masks agree with each other than with those of other texts. SIR divides J of "
            "random tokens by J of natural text: about 1 or more says that inertia needs no meaning, about 0 that "
            "it is semantic."
        ),
    ),
    Row(
        id="si1",
        section="mechanisms",
        title="SI1: how soon the mask settles",
        needs=RunKind.PROFILE,
        metrics="si1",
        data=prefix.curves,
        draw=prefix.draw,
        caption=prefix.caption,
        made_by=INERTIA,
        wide=False,
        how_to_read=(
            "The mask of the first P tokens against the masks of later tokens, as kappa: 0 is chance, 1 the same "
            "mask. The thick line is the mean of the layers above uniform chance, the dotted one above "
            "popularity: what the prompt adds to a static hot set. P90 marks the smallest P that reaches 90 % of "
            "the largest value."
        ),
    ),
    Row(
        id="si3",
        section="mechanisms",
        title="SI3: what activation size depends on",
        needs=RunKind.PROFILE,
        metrics="si3",
        data=variance.shares,
        draw=variance.draw,
        caption=variance.caption,
        made_by=INERTIA,
        wide=False,
        how_to_read=(
            "The variance of log |a|/‖a‖, split in this order: by neuron (what a static mask knows), by sequence "
            "(what a prompt mask can know), by token, by position; the rest depends on context. An earlier factor "
            "takes what it shares with a later one."
        ),
    ),
    Row(
        id="matrix",
        section="mechanisms",
        title="The 2×2: sentences or random words, alone or in one stream",
        needs=RunKind.PROFILE,
        metrics="matrix_2x2",
        data=sentences.matrices,
        draw=sentences.draw,
        caption=sentences.caption,
        made_by=INERTIA,
        how_to_read=(
            "Each cell compares the masks of two whole sentences: dark is alike. Left: each sentence fed alone; "
            "right: all in one stream, so that earlier ones can linger. Upper: real sentences; lower: random "
            "words. One colour scale. If the lower right matrix is darker than the lower left one, activations "
            "linger without any meaning: inertia."
        ),
    ),
    Row(
        id="hu1",
        section="mechanisms",
        title="HU1: same token, different histories",
        needs=RunKind.PROFILE,
        metrics="hu1",
        data=histories.controls,
        draw=histories.draw_controls,
        caption=histories.caption_controls,
        made_by=UNCERTAINTY,
        how_to_read=(
            "How different the masks of one token are after two histories of 64 tokens: 0, the token alone "
            "decides; 1, as different as chance. The controls say what of the history matters: its order "
            "(shuffled), its content (random), its presence (none). A different token after the same history "
            "below 1 means that the history leaves a trace of its own."
        ),
    ),
    Row(
        id="hu1-layers",
        section="mechanisms",
        title="HU1 by layer",
        needs=RunKind.PROFILE,
        metrics="hu1",
        data=histories.by_layer,
        draw=histories.draw_by_layer,
        caption=histories.caption_by_layer,
        made_by=UNCERTAINTY,
        how_to_read=(
            "The same by layer; 1 is what chance gives. Solid lines: chance were all neurons alike; dashed: were each "
            "neuron on as often as it is (a static hot set). Where the two part, a hot set makes masks alike. Bars "
            "are bootstrap intervals over contexts. The menu changes how many neurons a mask keeps."
        ),
    ),
    Row(
        id="hu2",
        section="mechanisms",
        title="HU2: what the token id leaves open",
        needs=RunKind.PROFILE,
        metrics="hu2",
        data=histories.information,
        draw=histories.draw_information,
        caption=histories.caption_information,
        made_by=UNCERTAINTY,
        wide=False,
        how_to_read=(
            "The entropy of a neuron's firing given the current token id, over its entropy without: 0, the token "
            "decides all neurons; 1, it says nothing. Corrected for few samples; the grey line checks that with "
            "shuffled labels. Bars are bootstrap intervals over texts."
        ),
    ),
    Row(
        id="hu4",
        section="mechanisms",
        title="HU4: does past salience tell the present one?",
        needs=RunKind.PROFILE,
        metrics="hu4",
        not_of_experts="it ranks all neurons of a layer at a token, which passes through some experts alone",
        data=gradients.salience,
        draw=gradients.draw_salience,
        caption=gradients.caption_salience,
        made_by=GRADIENTS,
        wide=False,
        how_to_read=(
            "MOYU's recursion: salience |a·dL/da| added up over the tokens so far, against that of the present "
            "token. 0: what mattered so far is what matters now; 1: it says nothing. Rising lines: the more "
            "varied the history, the less it says."
        ),
    ),
    Row(
        id="m2",
        section="mechanisms",
        title="M2: would less activation be better?",
        needs=RunKind.PROFILE,
        metrics="m2",
        data=gradients.signs,
        draw=gradients.draw_signs,
        caption=gradients.caption_signs,
        made_by=GRADIENTS,
        wide=False,
        how_to_read=(
            "The mean of sign(a)·dL/da over active entries. Above 0 the loss would fall if active neurons were "
            "smaller: over-activation, MOYU's root cause. Below 0 it would fall if they were larger."
        ),
    ),
    Row(
        id="union",
        section="mechanisms",
        title="Batch union",
        needs=RunKind.PROFILE,
        metrics="union",
        data=batch_union.curves,
        draw=batch_union.draw,
        caption=batch_union.caption,
        made_by=UNION,
        wide=False,
        how_to_read=(
            "The share of neurons that at least one of B tokens of different texts uses. Neuron sparsity pays in "
            "a batch only while this stays clearly under 100 %. The dashed line is what independent tokens would "
            "need, the dotted one what equally popular neurons would."
        ),
    ),
)
