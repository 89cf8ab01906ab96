"""Where every number comes from: the runs, their models, texts and machines, and the commands that repeat them."""

import shlex
from dataclasses import dataclass

from actsparse.report.sources import Source
from actsparse.report.wording import clean, count, number, one_line, size
from actsparse.results import ModelRecord, TextRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A run's provenance as pairs of name and value; `command` repeats the run."""

    letter: str
    kind: str
    path: str
    model: str
    complete: bool
    command: str
    facts: tuple[tuple[str, str], ...]


def origin(source: Source) -> Origin:
    """The provenance of a run."""
    manifest, made = source.manifest, source.manifest.provenance
    seconds = f", {number(made.seconds)} s" if made.seconds is not None else ""
    packages = ", ".join(f"{name} {version}" for name, version in made.packages.items())
    total = sum(file.bytes for file in manifest.files)
    facts = [
        ("model", _model(manifest.model) if manifest.model else "none"),
        *((f"text, {text.role}", _text(text)) for text in manifest.texts),
        ("device", f"{made.device}, {made.threads} thread{'s' * (made.threads != 1)}, {made.processor}"),
        ("made", f"{made.started}{seconds}"),
        ("software", f"actsparse {made.actsparse}, Python {made.python}, {packages}"),
        ("platform", made.platform),
        ("commit", made.git_commit or "not from a checkout"),
        ("fingerprint", manifest.fingerprint),
        (
            "files",
            f"{len(manifest.files)} file{'s' * (len(manifest.files) != 1)}, {size(total)}"
            if source.complete
            else "not finished",
        ),
    ]
    return Origin(
        letter=source.letter,
        kind=manifest.kind.value,
        path=one_line(str(source.run.path)),
        model=source.model_name,
        complete=source.complete,
        command=command_line(made.command),
        facts=tuple((one_line(name), clean(value)) for name, value in facts),
    )


def command_line(words: tuple[str, ...]) -> str:
    """A command as it can be pasted."""
    return one_line(shlex.join(words))


def _model(model: ModelRecord) -> str:
    revision = f" at {model.revision}" if model.revision else ""
    gated = "gated" if model.gated else "not gated"
    shape = (
        f"{model.model_type}, {model.activation} ({gated}), {model.layers} layers, d = {model.hidden_size}, "
        f"f = {model.intermediate_size}, {model.heads} heads, {model.kv_heads} KV groups, "
        f"{count(model.parameters)} parameters"
    )
    storage = f"{model.dtype}, {number(model.bytes_per_weight)} bytes a weight"
    quantised = f", {model.quantization}" if model.quantization else ""
    name = f"{model.resolved}{revision} (asked for: {model.requested})"
    return f"{name}; {shape}; {storage}{quantised}; weights sha256 {model.weights_sha256[:16]}"


def _text(text: TextRecord) -> str:
    blocks = f", blocks {text.blocks[0]} to {text.blocks[1] - 1}" if text.blocks else ""
    length = f" of {text.block_length} tokens" if text.block_length else ""
    prompt = f", the first {text.prompt_length} dense" if text.prompt_length else ""
    return (
        f"{text.source}: {count(text.sequences)} sequences{length}{blocks}{prompt}, {count(text.tokens)} tokens, "
        f"{text.sink_tokens} sink tokens; sha256 {text.sha256[:16]}"
    )
