"""`actsparse profile`."""

from typing import Annotated, cast

from actsparse.cli.options import (
    RUN,
    DataOptions,
    ModelOptions,
    OutputOptions,
    RunOptions,
    grouped,
    layer_list,
    option,
    shares,
)
from actsparse.cli.output import Output
from actsparse.core.mask_rules import mask_kinds
from actsparse.errors import ActsparseError
from actsparse.pipelines.probes.names import GRADIENTS, OF_EXPERTS, left_out, probe_names
from actsparse.pipelines.ranks import leads
from actsparse.specs import DUMP_KINDS, DumpSpec, ProfileSpec

HELP = "Record a model's neuron and head activations on your text."
EPILOG = "Example: actsparse profile --model smollm2 --prompts my_prompts.jsonl"


@grouped
def command(
    model: ModelOptions,
    data: DataOptions,
    run: RunOptions,
    show: OutputOptions,
    *,
    layers: Annotated[str | None, option("--layers", help="Layers to record, such as 0-7,31. [all]", panel=RUN)] = None,
    cett: Annotated[
        str, option("--cett", help="CETT levels solved exactly, comma-separated.", panel=RUN)
    ] = "0.1,0.2,0.3",
    reservoir_tokens: Annotated[
        int, option("--reservoir-tokens", help="Token positions kept for CETT and replays, at most.", panel=RUN)
    ] = 4096,
    batch_size: Annotated[
        int | None, option("--batch-size", "-b", help="Sequences in one forward pass. [by tokens]", panel=RUN)
    ] = None,
    reservoir_mb: Annotated[int, option("--reservoir-mb", help="Megabytes they may take.", panel=RUN)] = 512,
    probes: Annotated[
        str, option("--probes", help="Mechanisms: uncertainty,inertia,union,gradients; all; none.", panel=RUN)
    ] = "default",
    masks: Annotated[
        str, option("--masks", help="Masks that the probes compare: topk,cett,exact; all.", panel=RUN)
    ] = "topk",
    with_gradients: Annotated[
        bool, option("--gradients", help="Also the probe gradients: HU4 and M2, from backward passes.", panel=RUN)
    ] = False,
    decode: Annotated[
        int, option("--decode", help="Record N tokens that the model writes itself after each prompt.", panel=RUN)
    ] = 0,
    dump: Annotated[
        str | None,
        option("--dump", help="Write activations token by token: LAYERS:KINDS, 0-3:neuron,head_norm.", panel=RUN),
    ] = None,
    dump_tokens: Annotated[int, option("--dump-tokens", help="Token positions of --dump, at most.", panel=RUN)] = 1024,
    strict: Annotated[
        bool, option("--strict", help="Stop at NaN or infinite activations. Off: counted, read as zeros.", panel=RUN)
    ] = False,
) -> None:
    output = Output(json=show.json, quiet=show.quiet, verbose=show.verbose, debug=show.debug)
    bounds = {"--reservoir-tokens": reservoir_tokens, "--reservoir-mb": reservoir_mb, "--batch-size": batch_size}
    bounds |= {"--dump-tokens": dump_tokens, "--decode": decode or None}
    for name, value in bounds.items():
        if value is not None and value < 1:
            raise ActsparseError(f"{name} must be at least 1, not {value}", "correct the value")
    spec = ProfileSpec(
        model=model.spec(),
        data=data.spec(),
        layers=layer_list(layers),
        cett_targets=shares(cett, "--cett"),
        reservoir_tokens=reservoir_tokens,
        reservoir_mb=reservoir_mb,
        batch_size=batch_size,
        probes=probe_names([*probes.split(","), *([GRADIENTS] if with_gradients else [])]),
        masks=mask_kinds(masks.split(",")),
        decode=decode,
        dump=dump_spec(dump, dump_tokens),
        strict=strict,
        output=run.output,
        force=run.force,
        resume=run.resume,
    )
    from actsparse.cli.shown import show_profile
    from actsparse.pipelines.profile import profile

    found = profile(spec, output)
    if leads():
        show_profile(found, output)
        asked_for = (cast(list[str], found.manifest.spec[name]) for name in ("probes", "masks"))
        record = found.manifest.model
        mixed = record is not None and record.experts is not None
        output.note(OF_EXPERTS if mixed else left_out(*asked_for))


def dump_spec(text: str | None, tokens: int) -> DumpSpec | None:
    """`0-3,7:neuron,head_norm` as a request (`all:neuron` takes every layer); raises ActsparseError otherwise."""
    if text is None:
        return None
    layers, colon, kinds = text.partition(":")
    names = tuple(dict.fromkeys(kind.strip() for kind in kinds.split(",") if kind.strip()))
    example = "write for example --dump 0-3,7:neuron,head_norm or --dump all:attention_entropy"
    if not colon or not names:
        raise ActsparseError(f"--dump cannot be '{text}'", example)
    for name in names:
        if name not in DUMP_KINDS:
            raise ActsparseError(f"--dump: there is no kind '{name}'", f"known: {', '.join(DUMP_KINDS)}")
    return DumpSpec(layers=None if layers.strip() == "all" else layer_list(layers), kinds=names, tokens=tokens)
