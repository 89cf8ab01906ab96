"""Export of a static plan: a smaller checkpoint that plain transformers, and all that reads its format, loads."""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from actsparse.errors import PlanError, RunError
from actsparse.methods.gates import FixedGate
from actsparse.methods.plan import Plan, from_record
from actsparse.models.export import save_smaller, smaller_model
from actsparse.pipelines.profiled import Profiled
from actsparse.pipelines.progress import Progress
from actsparse.store import tensors
from actsparse.store.codec import pretty
from actsparse.store.files import disk_error, write_bytes
from actsparse.store.runs import PlanRun

RECORD = "actsparse_plan.json"


def export_plan(run: PlanRun, profiled: Profiled, folder: Path, *, force: bool, progress: Progress) -> None:
    """Write the model of a static plan, without the neurons that it drops, to `folder`, with the plan's record beside.

    The folder is whole or absent. Raises PlanError where the plan's masks depend on the text, RunError where the folder
    holds something else, ModelError where the family cannot be made smaller.
    """
    folder = folder.expanduser()
    _check_folder(folder, force)
    plan = from_record(run.plan, tensors.read(run.path / "plan.safetensors"), str(run.path))
    gates = fixed_gates(plan)
    progress.note(f"exporting {plan.name} to {folder}")
    with torch.no_grad():
        made = smaller_model(profiled.loaded.sites, [one.mask for one in gates], [one.fill for one in gates])
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_smaller(made, profiled.loaded.tokenizer, temporary)
        write_bytes(temporary / RECORD, pretty(run.plan).encode())
        # who may read the weights is what the umask says, not what a library chooses
        mode = (temporary / RECORD).stat().st_mode
        for path in temporary.iterdir():
            path.chmod(mode)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        raise disk_error(folder, tensors.system_error(error)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fixed_gates(plan: Plan) -> list[FixedGate]:
    """The masks of a plan; raises PlanError where they are not the same for every text."""
    gates = [layer.neurons for layer in plan.gates()]
    fixed = [gate for gate in gates if isinstance(gate, FixedGate)]
    if len(fixed) < len(gates) or any(layer.rules or layer.heads for layer in plan.gates()):
        raise PlanError(
            f"{plan.method.name} has no mask over neurons that holds for every text, as a smaller checkpoint needs",
            "export a static plan: --method static:stat=griffin --sparsity 0.5 --export DIR",
        )
    return fixed


def _check_folder(folder: Path, force: bool) -> None:
    """Refuse a folder that holds anything but an earlier export, and that one without `force`."""
    if folder.is_file():
        raise RunError(f"{folder} is a file, not a directory", "choose another place with --export")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / RECORD).exists():
        raise RunError(f"{folder} holds files that are not an export's", "choose an empty directory with --export")
    if not force:
        raise RunError(f"{folder} holds an export already", "overwrite it with --force, or choose another --export")
