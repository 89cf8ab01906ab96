"""What was found: the frozen outputs that flow between stages and onto disk. No torch here.

Sparsity is always given on a named basis: `neuron_frac` (neurons dropped), `channel_frac` (input channels dropped,
weighted by parameters), `mlp_bytes_frac` and `model_bytes_frac` (weight bytes of one decode step not read).
"""

from actsparse.results.evaluation import FEWEST_PAIRS as FEWEST_PAIRS
from actsparse.results.evaluation import BlockLayerRow as BlockLayerRow
from actsparse.results.evaluation import EvalRow as EvalRow
from actsparse.results.evaluation import Generation as Generation
from actsparse.results.evaluation import TaskItemRow as TaskItemRow
from actsparse.results.evaluation import ThroughputRow as ThroughputRow
from actsparse.results.evaluation import TimingRow as TimingRow
from actsparse.results.evaluation import TokenRow as TokenRow
from actsparse.results.evaluation import Verdict as Verdict
from actsparse.results.evaluation import path_tolerance as path_tolerance
from actsparse.results.manifest import SCHEMA_VERSION as SCHEMA_VERSION
from actsparse.results.manifest import FileRecord as FileRecord
from actsparse.results.manifest import Manifest as Manifest
from actsparse.results.manifest import Provenance as Provenance
from actsparse.results.manifest import RunKind as RunKind
from actsparse.results.manifest import TextRecord as TextRecord
from actsparse.results.model import ExpertsRecord as ExpertsRecord
from actsparse.results.model import FfnPlace as FfnPlace
from actsparse.results.model import ModelRecord as ModelRecord
from actsparse.results.model import StepBytes as StepBytes
from actsparse.results.model import ffn_places as ffn_places
from actsparse.results.plan import LayerPlan as LayerPlan
from actsparse.results.plan import MeasuredLayer as MeasuredLayer
from actsparse.results.plan import MeasuredPlan as MeasuredPlan
from actsparse.results.plan import Sparsity as Sparsity
from actsparse.results.plan import ThresholdPlan as ThresholdPlan
from actsparse.results.profile import DECODE as DECODE
from actsparse.results.profile import PREFILL as PREFILL
from actsparse.results.profile import HeadRow as HeadRow
from actsparse.results.profile import Measure as Measure
from actsparse.results.profile import NeuronRow as NeuronRow
from actsparse.results.profile import param as param
from actsparse.results.sites import SHARED_EXPERT as SHARED_EXPERT
from actsparse.results.sites import KvPolicy as KvPolicy
from actsparse.results.sites import Site as Site
from actsparse.results.sites import SiteKind as SiteKind
from actsparse.results.sites import Unit as Unit
from actsparse.results.study import ClaimVerdict as ClaimVerdict
from actsparse.results.study import PanelKind as PanelKind
from actsparse.results.study import StudyExperiment as StudyExperiment
from actsparse.results.study import StudyPanel as StudyPanel
from actsparse.results.study import StudyRow as StudyRow
