"""The option groups of `actsparse profile`; each checks and reads its own values."""

from dataclasses import dataclass
from typing import Annotated

from actsparse.cli.options import RUN, at_least, layer_list, option
from actsparse.core.mask_rules import mask_kinds
from actsparse.errors import ActsparseError
from actsparse.pipelines.probes.names import GRADIENTS, probe_names
from actsparse.specs import DUMP_KINDS, DumpSpec


@dataclass(frozen=True, kw_only=True)
class RecordingOptions:
    """What is recorded, and within which bounds."""

    layers: Annotated[str | None, option("--layers", help="Layers to record, such as 0-7,31. [all]", panel=RUN)] = None
    cett: Annotated[str, option("--cett", help="CETT levels solved exactly, comma-separated.", panel=RUN)] = (
        "0.1,0.2,0.3"
    )
    reservoir_tokens: Annotated[
        int, option("--reservoir-tokens", help="Token positions kept for CETT and replays, at most.", panel=RUN)
    ] = 4096
    reservoir_mb: Annotated[int, option("--reservoir-mb", help="Megabytes they may take.", panel=RUN)] = 512
    batch_size: Annotated[
        int | None, option("--batch-size", "-b", help="Sequences in one forward pass. [by tokens]", panel=RUN)
    ] = None
    decode: Annotated[
        int, option("--decode", help="Record N tokens that the model writes itself after each prompt.", panel=RUN)
    ] = 0
    strict: Annotated[
        bool, option("--strict", help="Stop at NaN or infinite activations. Off: counted, read as zeros.", panel=RUN)
    ] = False

    def check(self) -> None:
        """Raise ActsparseError on a number that is too small."""
        at_least(1, {"--reservoir-tokens": self.reservoir_tokens, "--reservoir-mb": self.reservoir_mb,
                     "--batch-size": self.batch_size})  # fmt: skip
        at_least(0, {"--decode": self.decode})


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Which mechanisms are measured, and on which masks."""

    probes: Annotated[
        str, option("--probes", help="Mechanisms: uncertainty,inertia,union,gradients; all; none.", panel=RUN)
    ] = "default"
    masks: Annotated[str, option("--masks", help="Masks that the probes compare: topk,cett,exact; all.", panel=RUN)] = (
        "topk"
    )
    with_gradients: Annotated[
        bool, option("--gradients", help="Also the probe gradients: HU4 and M2, from backward passes.", panel=RUN)
    ] = False

    @property
    def names(self) -> tuple[str, ...]:
        """The probes by name; raises ActsparseError on one that is not known."""
        asked = probe_names(self.probes.split(","))
        return probe_names((*asked, GRADIENTS)) if self.with_gradients else asked

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of masks; raises ActsparseError on one that is not known."""
        return mask_kinds(self.masks.split(","))


@dataclass(frozen=True, kw_only=True)
class DumpOptions:
    """What is written token by token."""

    dump: Annotated[
        str | None,
        option("--dump", help="Write activations token by token: LAYERS:KINDS, 0-3:neuron,head_norm.", panel=RUN),
    ] = None
    dump_tokens: Annotated[int, option("--dump-tokens", help="Token positions of --dump, at most.", panel=RUN)] = 1024

    def spec(self) -> DumpSpec | None:
        """`0-3,7:neuron,head_norm` as a request (`all:neuron` takes every layer), None without one; raises
        ActsparseError where it cannot be read."""
        at_least(1, {"--dump-tokens": self.dump_tokens})
        if self.dump is None:
            return None
        layers, colon, kinds = self.dump.partition(":")
        names = tuple(dict.fromkeys(kind.strip() for kind in kinds.split(",") if kind.strip()))
        if not colon or not names:
            raise ActsparseError(
                f"--dump cannot be '{self.dump}'",
                "write for example --dump 0-3,7:neuron,head_norm or --dump all:attention_entropy",
            )
        for name in names:
            if name not in DUMP_KINDS:
                raise ActsparseError(f"--dump: there is no kind '{name}'", f"known: {', '.join(DUMP_KINDS)}")
        chosen = None if layers.strip() == "all" else layer_list(layers)
        return DumpSpec(layers=chosen, kinds=names, tokens=self.dump_tokens)
