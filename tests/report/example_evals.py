"""Tables of an evaluation with plausible numbers."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from example_profiles import depth

from actsparse.results import EvalRow, Generation, ModelRecord, ThroughputRow, TimingRow, TokenRow

DENSE_PPL = 22.5
MLP_SHARE = 0.59


@dataclass(frozen=True, kw_only=True)
class ExamplePlan:
    """What an example evaluation says of a plan; `speed` None: it has no engine."""

    plan: str
    ppl: float | None
    neurons: float | None = 0.5
    saves: float = 1.0
    speed: float | None = None
    kl: float = 0.5
    top1: float = 0.6
    seed: int = 0


PLANS = (
    ExamplePlan(plan="griffin@0.25", ppl=39.0, neurons=0.25, speed=1.09, kl=0.62, top1=0.66),
    ExamplePlan(plan="griffin@0.5", ppl=88.5, speed=1.24, kl=1.41, top1=0.46),
    ExamplePlan(plan="tda:target_error=0.2", ppl=29.6, neurons=0.17, speed=1.05, kl=0.31, top1=0.75),
    ExamplePlan(plan="cats@0.25", ppl=23.2, neurons=0.25, saves=2 / 3, kl=0.03, top1=0.92),
    ExamplePlan(plan="cats@0.5", ppl=27.8, saves=2 / 3, kl=0.22, top1=0.79),
    ExamplePlan(plan="static:stat=griffin@0.25", ppl=34.0, neurons=0.25, speed=1.10, kl=0.48, top1=0.70),
    ExamplePlan(plan="static:stat=griffin@0.5", ppl=73.2, speed=1.27, kl=1.22, top1=0.49),
    ExamplePlan(plan="random@0.5", ppl=2.0e4, speed=1.26, kl=7.1, top1=0.06),
    ExamplePlan(plan="oracle-a@0.5", ppl=23.2, kl=0.03, top1=0.93),
)


def results(plans: tuple[ExamplePlan, ...], model: ModelRecord, dense: float) -> list[EvalRow]:
    rows: list[EvalRow] = []

    def add(
        plan: str,
        metric: str,
        value: float | None,
        unit: str = "1",
        param: str = "",
        n: int = 1024,
        stderr: float | None = None,
    ) -> None:
        rows.append(EvalRow(plan=plan, metric=metric, param=param, value=value, unit=unit, n=n, stderr=stderr))

    for metric, value in (("ppl", dense), ("ppl_low", dense * 0.9), ("ppl_high", dense * 1.11)):
        add("dense", metric, value)
    add("dense", "ms_per_token", 24.1, "ms", n=10)
    add("dense", "generate_ms_per_token", 31.7, "ms", n=10)
    add("dense", "ttft_ms", 512.0, "ms", n=10)
    for component, value in (("mlp", 318.5e6), ("attention", 106.2e6), ("head", 113.2e6)):
        add("dense", f"bytes_{component}", value, "bytes", n=1)
    for place, plan in enumerate(plans):
        name = plan.plan
        add(name, "ppl", plan.ppl)
        if plan.ppl is not None and math.isfinite(plan.ppl):
            add(name, "ppl_low", plan.ppl * 0.92)
            add(name, "ppl_high", plan.ppl * 1.09)
            add(name, "delta_nll", math.log(plan.ppl / dense), "nats", "reference=dense", stderr=0.03)
        for metric, value, unit, below, above in (
            ("kl", plan.kl, "nats", 0.1 * plan.kl, 0.14 * plan.kl),
            ("top1", plan.top1, "share", 0.03, 0.02),
        ):
            add(name, metric, value, unit)
            add(name, f"{metric}_low", value - below, unit)
            add(name, f"{metric}_high", value + above, unit)
        if plan.neurons is not None:
            for basis, shift in (
                ("predicted", 0.0),
                ("realised", -0.012 if "cats" in name or "tda" in name else 0.0),
                ("useful", 0.0),
            ):
                share = plan.neurons + shift
                useful = 0.0 if basis == "useful" and plan.speed is None else 1.0
                add(name, "neuron_frac", share * useful, "share", f"basis={basis}")
                add(name, "mlp_bytes_frac", share * plan.saves * useful, "share", f"basis={basis}")
                add(name, "model_bytes_frac", share * plan.saves * MLP_SHARE * useful, "share", f"basis={basis}")
        for layer in range(model.layers):
            at = depth(layer, model.layers)
            damage = 0.1 * math.log((plan.ppl or dense) / dense + 1.05) * (1 + 0.4 * math.sin(4 * at + place))
            add(name, "rel_err", min(1.0, abs(damage) + 0.05), "1", f"layer={layer}", stderr=0.004)
            add(
                name,
                "kept_frac",
                1 - (plan.neurons or 0) * (1 + (0.25 * math.sin(6 * at) if "tda" in name else 0)),
                "share",
                f"layer={layer}",
            )
        if plan.speed is not None:
            share = (plan.neurons or 0) * plan.saves * MLP_SHARE
            for metric, value in (
                ("speedup", plan.speed),
                ("speedup_low", plan.speed - 0.035),
                ("speedup_high", plan.speed + 0.04),
            ):
                add(name, metric, value, n=5)
            add(name, "ceiling", 1 / (1 - share), n=1)
            add(name, "ms_per_token", 24.1 / plan.speed, "ms", n=10)
            add(name, "prefill_ms", 512.0, "ms", n=10)
            add(name, "select_ms", 61.0, "ms", n=10)
            add(name, "ttft_ms", 573.0, "ms", n=10)
            add(name, "break_even_tokens", 61.0 / (24.1 - 24.1 / plan.speed) if plan.speed > 1 else None, "tokens", n=1)
            add(name, "path_check", 2e-5, "nats", n=8)
            add(name, "bytes_mlp", 318.5e6 * (1 - (plan.neurons or 0) * plan.saves), "bytes", n=1)
            add(name, "bytes_attention", 106.2e6, "bytes", n=1)
            add(name, "bytes_head", 113.2e6, "bytes", n=1)
    return rows


def tokens(plans: tuple[ExamplePlan, ...], dense: float, random: np.random.Generator) -> list[TokenRow]:
    rows = []
    for block in range(4):
        ids = random.integers(0, 49152, 256)
        base = random.gamma(1.2, math.log(dense) / 1.2, 256)
        for name, ppl, kl, top1 in [
            ("dense", dense, 0.0, 1.0),
            *((plan.plan, plan.ppl or dense, plan.kl, plan.top1) for plan in plans),
        ]:
            added = (
                random.gamma(0.6, max(1e-6, math.log(max(ppl, dense) / dense)) / 0.6 + 1e-6, 256)
                if name != "dense" and math.isfinite(ppl)
                else np.zeros(256)
            )
            grown = kl * (0.75 + 0.5 * np.arange(256) / 256) * random.gamma(1.5, 1 / 1.5, 256)
            agree = random.random(256) < top1
            rows += [
                TokenRow(
                    plan=name,
                    replica=0,
                    block=block,
                    position=256 + place,
                    token=int(ids[place]),
                    nll=float(base[place] + added[place]),
                    kl=float(grown[place]),
                    top1=bool(agree[place]),
                )
                for place in range(256)
            ]
    return rows


def timing(plans: tuple[ExamplePlan, ...], random: np.random.Generator) -> list[TimingRow]:
    rows = []
    for plan in plans:
        if plan.speed is None:
            continue
        for repetition in range(5):
            for arm, speed in (("dense", 1.0), ("sparse", plan.speed), ("generate", 0.76)):
                wobble = float(random.normal(1, 0.02))
                phases = [("prefill", 256, 0.512 * wobble), ("decode", 16, 16 * 0.0241 / speed * wobble)]
                phases += [("select", 0, 0.061 * wobble)] if arm == "sparse" else []
                owner = plan.plan if arm == "sparse" else ("dense" if arm == "generate" else plan.plan)
                rows += [
                    TimingRow(
                        plan=owner,
                        arm=arm,
                        phase=phase,
                        prompt=0,
                        repetition=repetition,
                        tokens=tokens,
                        seconds=seconds,
                    )
                    for phase, tokens, seconds in phases
                ]
    return rows


def generations(plans: tuple[ExamplePlan, ...], prompt: str, continuation: str | None) -> list[Generation]:
    dense = (
        continuation
        or " At the top she lit the lamp and watched the beam cross the water, slow and certain, until the first boats "
        "answered from the bay."
    )
    endings = {
        "griffin@0.5": (
            " At the top she lit the lamp and lit the lamp and lit the lamp, and the lamp was lit again by the lamp.",
            8,
            0.41,
        ),
        "griffin@0.25": (
            " At the top she lit the lamp and watched the beam go out over the harbour, where nobody was waiting.",
            14,
            0.0,
        ),
        "random@0.5": (" the of of, the. and the of a the in the of the a", 0, 0.55),
        "cats@0.5": (dense, None, 0.0),
    }
    rows = []
    for number in range(3):
        for plan in ["dense", *(plan.plan for plan in plans)]:
            text, divergence, repetition = endings.get(
                plan, (dense[: len(dense) // 2] + " then turned back to the stairs.", 15, 0.05)
            )
            if plan == "dense":
                text, divergence, repetition = dense, None, 0.0
            rows.append(
                Generation(
                    plan=plan,
                    prompt=number,
                    prompt_text=prompt,
                    text=text,
                    tokens=48,
                    first_divergence=divergence,
                    repetition=repetition,
                )
            )
    return rows


def summary(path: Path, plans: tuple[ExamplePlan, ...], warnings: tuple[str, ...]) -> dict[str, Any]:
    return {
        "model": {"resolved": "x"},
        "data": {},
        "device": {"name": "cpu"},
        "dense": {"quality": {}, "speed": {}},
        "plans": [
            {
                "plan": plan.plan,
                "method": plan.plan.split("@")[0].split(":")[0],
                "sparsity": {},
                "quality": {},
                "speed": None if plan.speed is None else {},
                **({"speed_reason": "no engine yet: quality only"} if plan.speed is None else {}),
            }
            for plan in plans
        ],
        "warnings": list(warnings),
        "run": str(path),
    }


def task_rows(plans: tuple[ExamplePlan, ...]) -> list[EvalRow]:
    """Scores of two tasks: one hurts in generation, one that no sparse position touches."""
    rows: list[EvalRow] = []

    def add(plan: str, metric: str, value: float, task: str, half: float, n: int = 200, reference: str = "") -> None:
        where = f"reference={reference},task={task}" if reference else f"task={task}"
        for end, sign in (("", 0.0), ("_low", -1.0), ("_high", 1.0)):
            if half or not end:
                rows.append(
                    EvalRow(
                        plan=plan, metric=f"{metric}{end}", param=where, value=value + sign * half, unit="share", n=n
                    )
                )

    for plan in ("dense", *(one.plan for one in plans)):
        loss = 0.0 if plan == "dense" else 0.3 if "griffin" in plan else 0.02
        for task, metric, score, used in (("arithmetic", "exact_match", 0.6, 1.0), ("choices", "acc", 0.7, 0.0)):
            lost = loss if used else 0.0
            add(plan, metric, score - lost, task, 0.06)
            add(plan, "exercised_frac", 0.0 if plan == "dense" else used, task, 0.0)
            if plan != "dense":
                add(plan, f"delta_{metric}", -lost, task, 0.04, reference="dense")
    return rows


def throughput(plans: tuple[ExamplePlan, ...]) -> list[ThroughputRow]:
    """Steps at four batch sizes and two lengths; sparse plans stop paying at batch 4."""
    return [
        ThroughputRow(
            plan=plan, batch_size=batch, prompt_length=128, gen_length=length, metric=metric, unit="ms", n=50,
            value=24.0 + batch + length / 64 - gain / batch + (batch > 3 and gain > 0) * 3,
        )
        for plan, gain in [("dense", 0.0), *((one.plan, 6.0) for one in plans if one.speed is not None)]
        for batch in (1, 2, 4, 8)
        for length in (32, 128)
        for metric in ("ms_p50", "ms_p99")
    ]  # fmt: skip
