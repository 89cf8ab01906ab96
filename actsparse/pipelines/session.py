"""One evaluation at work."""

from dataclasses import dataclass

from actsparse.data.texts import EvalTexts
from actsparse.models.load import LoadedModel
from actsparse.pipelines.progress import Progress
from actsparse.results import StepBytes
from actsparse.specs import EvalSpec
from actsparse.store.run import RunWriter


@dataclass(frozen=True)
class Session:
    """What is evaluated, on what text, and where it is written."""

    spec: EvalSpec
    loaded: LoadedModel
    texts: EvalTexts
    cost: StepBytes
    writer: RunWriter
    progress: Progress

    def warn(self, text: str) -> None:
        """Keep a warning in the run, and show it."""
        self.writer.warn(text)
        self.progress.warn(text)
