"""Tables of a profile with plausible numbers."""

import math

import numpy as np

from actsparse.results import HeadRow, Measure, ModelRecord, NeuronRow


def depth(layer: int, layers: int) -> float:
    return layer / max(1, layers - 1)


def measures(model: ModelRecord, random: np.random.Generator, relu: bool) -> list[Measure]:
    rows: list[Measure] = [Measure(metric="tokens", value=2032, unit="tokens", n=2032)]

    def add(
        metric: str,
        layer: int,
        kind: str,
        value: float,
        *,
        param: str = "",
        unit: str = "share",
        n: int = 2032,
        stderr: float | None = None,
    ) -> None:
        rows.append(
            Measure(
                metric=metric, layer=layer, kind=kind, param=param, value=float(value), unit=unit, n=n, stderr=stderr
            )
        )

    for layer in range(model.layers):
        at, noise = depth(layer, model.layers), float(random.normal(0, 0.012))
        ends = 0.24 * math.exp(-12 * at) + 0.26 * math.exp(-14 * (1 - at))
        for kind, ratio in {
            "attn_in": 0.52,
            "attn_out": 0.44,
            "mlp_in": 0.55,
            "gate": 0.3,
            "up": 0.56,
            "neuron": 0.2,
        }.items():
            rms = 0.4 + at
            zero = 0.88 - 0.2 * at if relu and kind in ("gate", "neuron") else 0.0
            add("rms", layer, kind, rms, unit="1")
            add("abs_mean", layer, kind, 0.6 * rms, unit="1")
            add("zero_frac", layer, kind, zero)
            median = 0.0 if zero > 0.5 else rms * (ratio - 0.3 * ends + noise)
            add("abs_quantile", layer, kind, max(0.0, median), param="s=0.5", unit="1")
            add("abs_quantile", layer, kind, rms * 1.5, param="s=0.9", unit="1")
        for target, mean in ((0.1, 0.47), (0.2, 0.65), (0.3, 0.765)):
            add(
                "cett_sparsity", layer, "neuron", min(0.97, mean + ends + noise), param=f"target={target}", stderr=0.004
            )
            for end, off in (("p10", -0.08), ("p90", 0.06)):
                if target == 0.2:
                    value = min(0.99, mean + ends + noise + off)
                    add(f"cett_sparsity_{end}", layer, "neuron", value, param=f"target={target}")
            later = f"phase=decode,target={target}"
            add("cett_sparsity", layer, "neuron", min(0.97, mean + ends) - 0.1, param=later, stderr=0.004)
            add("cett_eps", layer, "neuron", 0.02 * target * (1 + at), param=f"target={target}", unit="1")
        add("cett_rho", layer, "neuron", 1.05 + noise, unit="1")
        for step in range(32):
            share = round(1 - 0.97 ** (1 + step * step / 10), 3)
            add("cett_curve", layer, "neuron", share ** (3.2 + 3 * ends) * 0.95, param=f"sparsity={share}", unit="1")
        add("neuron_gini", layer, "neuron", 0.42 + ends, unit="1")
        add("hot_frac", layer, "neuron", 0.05 + 0.1 * ends)
        add("dead_frac", layer, "neuron", 0.002 + 0.3 * ends**2)
        add("head_gini", layer, "attn_out", 0.2 + 0.2 * at, param="unit=head", unit="1")
        add("head_gini", layer, "attn_out", 0.12 + 0.1 * at, param="unit=group", unit="1")
        for power in range(2, 9):
            span = f"from={2**power},to={2 ** (power + 1)}"
            add(
                "position_rms",
                layer,
                "neuron",
                (0.4 + at) * (1 + 0.05 * math.cos(power + at) + 0.01 * power + noise),
                param=span,
                unit="1",
                n=2**power * 4,
            )
            if relu:
                add("position_sparsity", layer, "neuron", 0.6 + 0.01 * power, param=span)
                add("position_zero_frac", layer, "neuron", 0.8 - 0.01 * power, param=span)
    return rows


def neurons(model: ModelRecord, random: np.random.Generator) -> list[NeuronRow]:
    rows = []
    for layer in range(model.layers):
        rates = np.clip(random.beta(0.9, 3.4, model.intermediate_size), 0, 1)
        rows += [
            NeuronRow(
                layer=layer,
                neuron=place,
                active_frac=float(rate),
                nonzero_frac=1.0,
                mean_abs=float(rate),
                max_abs=float(5 * rate),
                mean_norm=float(rate) * 0.4,
                griffin=float(rate) * 0.1,
                mean=0.0,
                mean_square_up=float(rate),
            )
            for place, rate in enumerate(rates)
        ]
    return rows


def heads(model: ModelRecord, random: np.random.Generator) -> list[HeadRow]:
    rows = []
    for layer in range(model.layers):
        for unit, count in (("head", model.heads), ("group", model.kv_heads)):
            norms = random.lognormal(0, 0.5, count)
            rows += [
                HeadRow(layer=layer, unit=unit, index=place, mean_norm=float(norm), share=float(norm / norms.sum()))
                for place, norm in enumerate(norms)
            ]
    return rows


def histograms(model: ModelRecord, random: np.random.Generator) -> dict[str, np.ndarray]:
    edges = np.concatenate([[0.0], np.logspace(-8, 4, 1201)])
    found = {}
    for layer in range(model.layers):
        for kind, centre in (("neuron", -1.6), ("gate", -1.1), ("up", -0.4)):
            values = 10 ** random.normal(centre + 0.5 * depth(layer, model.layers), 0.62, 8000)
            counts, _ = np.histogram(np.clip(values, 1e-8, 9e3), edges)
            found[f"layers.{layer}.{kind}.counts"] = counts.astype(np.int64)
            found[f"layers.{layer}.{kind}.edges"] = edges
    return found


def coactivation(model: ModelRecord, hottest: int = 12, tokens: int = 1000) -> dict[str, np.ndarray]:
    """Counts of the hottest neurons of every layer: the first three of layer 0 always fire together, the last never."""
    found: dict[str, np.ndarray] = {"tokens": np.array([tokens])}
    for layer in range(model.layers):
        rates = np.linspace(0.6, 0.3, hottest)
        counts = np.round(tokens * np.outer(rates, rates))
        np.fill_diagonal(counts, np.round(tokens * rates))
        if layer == 0:
            counts[:3, :3] = 500
            counts[-1, :] = counts[:, -1] = 0
        found[f"layers.{layer}.neurons"] = np.arange(100, 100 + hottest)
        found[f"layers.{layer}.counts"] = counts.astype(np.int64)
    return found
