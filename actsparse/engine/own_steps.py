"""What the own steps of one model share, on the CPU or on CUDA: its weights, packed once, and which engine runs."""

from collections.abc import Callable

from actsparse.engine.cpu.engine import CpuEngine
from actsparse.engine.cpu.ops import MAX_BATCH
from actsparse.engine.cuda.availability import most_sequences, native_refusal
from actsparse.engine.step.decoder import Engine
from actsparse.engine.step.packing import share_storage, weights_from_model
from actsparse.engine.step.translate import Translator
from actsparse.engine.step.weights import Weights
from actsparse.models.sites import ModelSites

NO_ATOMICS = "fast atomics change nothing here: the engine at work adds in one order, without atomics"


class OwnSteps:
    """What a model's own steps share: its weights packed once, and matrices stored one row an input.

    `share`: the model's parameters become views of the packed weights, the same values bit for bit, so that they are
    held once. `fast_atomics`: steps whose kernels can add partial sums in any order, which is faster and not to the
    same bits each time. Raises ModelError where the family has no step.
    """

    def __init__(
        self, sites: ModelSites, note: Callable[[str], None], *, share: bool, fast_atomics: bool = False
    ) -> None:
        self.sites = sites
        self.weights: Weights = weights_from_model(sites.model)
        if share:
            share_storage(sites.model, self.weights)
        self.translator = Translator(self.weights)
        self.note = note
        self._fast_atomics = fast_atomics

    @property
    def most_sequences(self) -> int:
        """How many sequences a step takes at once without torch.compile."""
        if self.weights.device.type == "cuda":
            return 0 if native_refusal(self.weights) else most_sequences(self.weights)
        return MAX_BATCH

    def engine(self, batch: int) -> Engine:
        """A new engine of the weights' device."""
        if self.weights.device.type == "cuda":
            from actsparse.engine.cuda.engine import CudaEngine

            return CudaEngine(self.weights, batch=batch, fast_atomics=self._fast_atomics)
        return CpuEngine(note=self.note, warnings=[NO_ATOMICS] if self._fast_atomics else [])
