"""Calibration targets: how much a method may drop so that bytes, perplexity or the possible speed-up come out as asked.

Every target is solved to a short form that says it all (`griffin@0.41`, `tda:target_error=0.13`), so that a plan can be
made again without its search. Targets that cannot be reached are errors that name the nearest one that can.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import exp, isfinite, log

import torch
from jaxtyping import Float
from torch import Tensor

from actsparse.core.cost import ceiling
from actsparse.engine.masked import MaskedPlan, masked
from actsparse.errors import PlanError
from actsparse.methods.gates import LayerGates
from actsparse.methods.plan import Plan
from actsparse.methods.short import ShortForm, parse
from actsparse.pipelines.profiled import Profiled
from actsparse.pipelines.progress import Progress
from actsparse.pipelines.quality import scored_logits
from actsparse.results import Sparsity
from actsparse.specs import ThresholdSpec

BASES = ("unit", "neuron", "mlp-bytes", "model-bytes")
MOST = 0.99
BYTE_STEPS = 12
BYTE_TOLERANCE = 5e-4
PPL_STEPS = 10
PPL_TOLERANCE = 0.02

FitPlan = Callable[[ShortForm], Plan]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is asked for: a share of bytes or neurons not used, or a relative rise in perplexity; one of the two."""

    share: float | None = None
    basis: str = "model-bytes"
    ppl_increase: float | None = None
    speedup: float | None = None

    @property
    def text(self) -> str:
        """How the plan's record names it."""
        if self.ppl_increase is not None:
            return f"ppl_increase={self.ppl_increase:g}"
        if self.speedup is not None:
            return f"speedup={self.speedup:g}"
        return f"{self.basis}={self.share:g}"


def target_of(spec: ThresholdSpec) -> Target | None:
    """The target that must be solved; None where the short form says how much to drop. Raises PlanError where targets
    exclude each other or are out of range."""
    given = {
        "--sparsity": spec.sparsity,
        "--target-error": spec.target_error,
        "--target-ppl-increase": spec.target_ppl_increase,
        "--target-speedup": spec.target_speedup,
    }
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise PlanError(f"both {named[0]} and {named[1]} are given", "give one target")
    if named and "@" in spec.plan:
        raise PlanError(f"'{spec.plan}' names a share already", f"leave out @x, or {named[0]}")
    if spec.basis not in BASES:
        raise PlanError(f"there is no basis '{spec.basis}'", f"it is one of {', '.join(BASES)}")
    if spec.basis != "unit" and spec.sparsity is None:
        raise PlanError(
            "--basis says what --sparsity is a share of, and that is not given", _without_basis(spec, named)
        )
    if spec.target_speedup is not None:
        if not 1 < spec.target_speedup < float("inf"):
            raise PlanError(f"--target-speedup must be above 1, not {spec.target_speedup:g}", "write 1.3")
        return Target(share=1 - 1 / spec.target_speedup, speedup=spec.target_speedup)
    if spec.target_ppl_increase is not None:
        if not 0 < spec.target_ppl_increase < float("inf"):
            raise PlanError(
                f"--target-ppl-increase must be above 0, not {spec.target_ppl_increase:g}", "write 1% or 0.01"
            )
        return Target(ppl_increase=spec.target_ppl_increase)
    return None if spec.basis == "unit" else Target(share=spec.sparsity, basis=spec.basis)


def _without_basis(spec: ThresholdSpec, targets: list[str]) -> str:
    """How to go on where a basis is given without a share on it."""
    if targets:
        return f"leave out --basis: {targets[0]} has none"
    method, at, amount = spec.plan.partition("@")
    share = amount or "0.25"
    return (f"write the share apart: --method {method} " if at else "add ") + f"--sparsity {share} --basis {spec.basis}"


def asked_form(spec: ThresholdSpec) -> ShortForm:
    """The short form with the amount that --sparsity or --target-error name; without one, where a target must be solved
    first, with nothing dropped."""
    if target_of(spec) is not None:
        return with_amount(spec.plan, drop=0.0)
    if spec.sparsity is not None:
        return with_amount(spec.plan, drop=spec.sparsity)
    return parse(spec.plan) if spec.target_error is None else with_amount(spec.plan, error=spec.target_error)


def with_amount(plan: str, *, drop: float | None = None, error: float | None = None) -> ShortForm:
    """The short form of a plan without an amount, with a share to drop or an error target."""
    if drop is not None:
        return parse(f"{plan}@{drop:.6g}")
    return parse(f"{plan}{',' if ':' in plan else ':'}target_error={error:.6g}")


def solve(target: Target, spec: ThresholdSpec, profiled: Profiled, fit: FitPlan, progress: Progress) -> Plan:
    """The plan that meets a target; raises PlanError naming the nearest one where none does."""
    if target.ppl_increase is not None:
        plan = _for_perplexity(target.ppl_increase, spec.plan, profiled, fit, progress)
    else:
        plan = _for_bytes(target, spec.plan, fit)
    return replace(plan, target=target.text)


def _for_bytes(target: Target, text: str, fit: FitPlan) -> Plan:
    """The share whose predicted sparsity on a basis is the target: secant steps kept inside a bracket, since most
    methods save in proportion to what they drop."""
    assert target.share is not None
    wanted = target.share
    most = fit(with_amount(text, drop=MOST))
    reach = on_basis(most.predicted, target.basis)
    if reach is None:
        raise PlanError(
            f"{most.method.name} drops no neurons, so it has no sparsity on the basis 'neuron'",
            "use --basis model-bytes",
        )
    if wanted > reach:
        raise _out_of_reach(target, most, reach)
    low, high = (0.0, 0.0), (MOST, reach)
    drop, best, off = wanted / reach * MOST, most, reach - wanted
    for _ in range(BYTE_STEPS):
        plan = fit(with_amount(text, drop=drop))
        found = on_basis(plan.predicted, target.basis)
        assert found is not None
        if abs(found - wanted) < off:
            best, off = plan, abs(found - wanted)
        low, high = ((drop, found), high) if found < wanted else (low, (drop, found))
        if off <= BYTE_TOLERANCE or high[0] - low[0] < BYTE_TOLERANCE:
            break
        drop = _between(low, high, wanted)
    return best


def _between(low: tuple[float, float], high: tuple[float, float], wanted: float) -> float:
    """Where the line through two points reaches `wanted`, kept off the ends of the bracket."""
    (left, below), (right, above) = low, high
    weight = (wanted - below) / (above - below) if above > below else 0.5
    return left + min(0.95, max(0.05, weight)) * (right - left)


def _out_of_reach(target: Target, most: Plan, reach: float) -> PlanError:
    name = most.method.name
    if target.speedup is not None:
        best = max(1.0, ceiling(max(0.0, reach)))
        return PlanError(
            f"{name} cannot make this model {target.speedup:g}x faster: not reading {max(0.0, reach):.1%} of its bytes"
            f" is the most, at best {best:.3f}x",
            f"ask for --target-speedup {max(1.001, best - 0.005):.2f}, or use a method that saves more bytes",
        )
    assert target.share is not None
    nearest = max(0.0, reach)
    return PlanError(
        f"{name} cannot reach {target.share:.1%} on the basis {target.basis}: {nearest:.1%} is the most",
        f"ask for --sparsity {max(0.0, nearest - 0.001):.3f} --basis {target.basis},"
        " or use a method that saves more: actsparse methods",
    )


def on_basis(sparsity: Sparsity, basis: str) -> float | None:
    """Sparsity on a basis by its name on the command line."""
    return {
        "neuron": sparsity.neuron_frac,
        "mlp-bytes": sparsity.mlp_bytes_frac,
        "model-bytes": sparsity.model_bytes_frac,
    }[basis]


def _for_perplexity(increase: float, text: str, profiled: Profiled, fit: FitPlan, progress: Progress) -> Plan:
    """The plan of the largest amount whose perplexity on the calibration text, in the decode regime, rises by at most
    `increase` (CETT-PPL-p%: for methods with an error target of their own, the target is what is searched)."""
    by_error = parse(with_amount(text, drop=0.0).text).method.takes_error_target
    dense = _loss(None, profiled)

    def rise(plan: Plan) -> float:
        found = exp(min(50.0, _loss(plan.gates(), profiled) - dense)) - 1
        progress.note(f"{plan.name}: perplexity {found:+.2%} on the calibration text")
        return found

    low, high = 0.0, MOST
    best: tuple[Plan, float] | None = None
    least = float("inf")
    with progress.task(f"searching for perplexity {increase:+.1%}", PPL_STEPS, "plans") as advance:
        for step in range(PPL_STEPS):
            amount = _first_guess(increase) if step == 0 else (low + high) / 2
            plan = fit(with_amount(text, error=amount) if by_error else with_amount(text, drop=amount))
            found = rise(plan)
            least = min(least, found)
            advance(1)
            if found <= increase:
                low, best = amount, (plan, found)
            else:
                high = amount
            if best is not None and abs(best[1] - increase) <= PPL_TOLERANCE * increase:
                break
    if best is None:
        raise PlanError(
            f"no plan of {text} found keeps perplexity within {increase:+.2%}: the nearest is {least:+.2%}",
            f"ask for --target-ppl-increase {max(least, 0.0) * 1.01:.2%}",
        )
    return best[0]


def _first_guess(increase: float) -> float:
    """Where to begin: little for a small rise, half for a large one."""
    return min(0.5, 0.1 + 0.25 * log(1 + 10 * increase))


@torch.no_grad()
def _loss(gates: list[LayerGates] | None, profiled: Profiled) -> float:
    """Mean negative log-likelihood of tokens P..S-1 of the calibration blocks under gates (None: dense)."""
    loaded, prompt_length = profiled.loaded, profiled.prompt_length
    total, count = 0.0, 0
    for block in profiled.blocks.ids:
        targets = block[prompt_length:].to(loaded.device)
        if gates is None:
            logits = scored_logits(loaded, block, prompt_length)
        else:
            sink = profiled.blocks.record.sink_tokens
            with masked(loaded.sites, MaskedPlan(gates, prompt_length=prompt_length, sink_tokens=sink)):
                logits = scored_logits(loaded, block, prompt_length)
        total += float(_nll(logits, targets).double().sum())
        count += len(targets)
    loss = total / count
    return loss if isfinite(loss) else float("inf")


def _nll(logits: Float[Tensor, "tokens vocab"], targets: Tensor) -> Float[Tensor, " tokens"]:
    return -logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
