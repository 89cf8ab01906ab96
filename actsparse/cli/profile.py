"""`actsparse profile`."""

from typing import cast

from actsparse.cli.options import DataOptions, ModelOptions, OutputOptions, RunOptions, grouped, layer_list, shares
from actsparse.cli.output import Output
from actsparse.cli.profile_options import DumpOptions, ProbeOptions, RecordingOptions
from actsparse.pipelines.probes.names import left_out
from actsparse.pipelines.ranks import leads
from actsparse.specs import ProfileSpec

HELP = "Record a model's neuron and head activations on your text."
EPILOG = "Example: actsparse profile --model smollm2 --prompts my_prompts.jsonl"


@grouped
def command(
    model: ModelOptions,
    data: DataOptions,
    run: RunOptions,
    show: OutputOptions,
    *,
    recording: RecordingOptions,
    probe: ProbeOptions,
    dump: DumpOptions,
) -> None:
    output = Output(json=show.json, quiet=show.quiet, verbose=show.verbose, debug=show.debug)
    recording.check()
    spec = ProfileSpec(
        model=model.spec(),
        data=data.spec(),
        layers=layer_list(recording.layers),
        cett_targets=shares(recording.cett, "--cett"),
        reservoir_tokens=recording.reservoir_tokens,
        reservoir_mb=recording.reservoir_mb,
        batch_size=recording.batch_size,
        probes=probe.names,
        masks=probe.kinds,
        decode=recording.decode,
        dump=dump.spec(),
        strict=recording.strict,
        output=run.output,
        force=run.force,
        resume=run.resume,
    )
    from actsparse.cli.shown_profile import show_profile
    from actsparse.pipelines.profile import profile

    found = profile(spec, output)
    if leads():
        show_profile(found, output)
        asked_for = (cast(list[str], found.manifest.spec[name]) for name in ("probes", "masks"))
        record = found.manifest.model
        mixed = record is not None and record.experts is not None
        output.note(left_out(*asked_for, experts=mixed))
