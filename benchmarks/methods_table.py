"""Make docs/methods/results.md: every method at equal bytes of the model, beside its control, and auto beside them.

    python benchmarks/methods_table.py --model smollm2 --corpus wikitext2-test.txt -o docs/methods/results.md

Each part is an evaluation of its own under --runs: progress and finished rows are shown, an interrupted command goes on
where it stopped, and the page is written again after every part. Routers learn from more text than other methods are
fitted on (--router-blocks); --router-epochs and --router-tokens bound their training.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from methods_budgets import Entry, Shares, entries
from methods_page import (
    ROUTER,
    Book,
    allocation_section,
    auto_section,
    budget_section,
    control_section,
    heads_section,
    ordering_section,
)

from actsparse.cli.output import Output
from actsparse.models.load import load
from actsparse.pipelines.evaluate import evaluate
from actsparse.specs import DataSpec, EvalSpec, ModelSpec
from actsparse.store.runs import EvalRun

TABLE = (0.25, 0.4)
BUDGETS = (0.1, 0.2, 0.3, 0.4)
SINGLE = ("teal", "wina", "cats")
FITTED = {
    "prompt": ("random", "static", "static:stat=griffin", "static:stat=coreinfer", "griffin", "tda", "coreinfer"),
    "neurons": ("cats", "chess", "countdown", "cett", "oracle-n", "oracle-a"),
    "channels": ("teal", "wina", "rsparse", "larosa"),
    "controls": ("channels-static", "channels-static:stat=mean_abs", "channels-random"),
}
DEJAVU = (ROUTER, "dejavu:input=lookahead")
EXPERTS = (
    "moefication:router=centroid", "moefication:router=mlp", "moefication:routing=sequence",
    "moefication:routing=static",
)  # fmt: skip
ALLOCATED = (
    "teal:allocation=greedy", "teal:allocation=sensitivity", "wina:allocation=greedy", "wina:allocation=sensitivity",
)  # fmt: skip
BY_LAYER = (
    "cats:allocation=sensitivity", "griffin:allocation=sensitivity", "static:stat=griffin,allocation=sensitivity",
)  # fmt: skip
PARTS = (*FITTED, "routers", "heads", "head-controls", "layers", "allocation", "auto")


@dataclass(frozen=True)
class Plans:
    """What every part runs, by budget; heads and their controls have no budget."""

    fitted: dict[str, dict[float, list[Entry]]]
    routers: dict[float, list[Entry]]
    heads: list[Entry]
    head_controls: list[Entry]
    allocation: dict[float, list[Entry]]
    layers: dict[float, list[Entry]]
    auto: dict[float, list[Entry]]
    missed: dict[float, list[str]]

    def of_part(self, part: str) -> list[Entry]:
        """The plans of a part."""
        if part in ("heads", "head-controls"):
            return self.heads if part == "heads" else self.head_controls
        named = {
            "routers": self.routers, "layers": self.layers, "allocation": self.allocation, "auto": self.auto,
        }  # fmt: skip
        return [one for found in (named | self.fitted)[part].values() for one in found]

    def at(self, target: float) -> list[Entry]:
        """The plans of the table of one budget."""
        auto = [one for one in self.auto.get(target, []) if one.label == "auto"]
        return [*(one for table in self.fitted.values() for one in table[target]), *self.routers[target], *auto]

    @property
    def tables(self) -> dict[float, list[Entry]]:
        """The plans of the tables by budget."""
        return {target: self.at(target) for target in TABLE}


def main() -> None:
    asked = _arguments()
    output = Output(verbose=asked.verbose)
    plans = _plans(asked, output)
    asked.runs.mkdir(parents=True, exist_ok=True)
    runs = []
    for part in asked.parts:
        folder = asked.runs / f"methods-{part}"
        if asked.page_only:
            runs += [EvalRun.open(folder)] if (folder / "manifest.json").exists() else []
            continue
        output.note(f"{part}: {len(plans.of_part(part))} plans")
        run = _evaluate(asked, part, folder, [one.plan for one in plans.of_part(part)], output)
        runs.append(run)
        for row in Book([run]).rows(plans.of_part(part)):
            print(row.told, flush=True)
        asked.output.write_text(page(asked, Book(runs), plans))
    asked.output.write_text(page(asked, Book(runs), plans))
    print(asked.output)


def page(asked: argparse.Namespace, book: Book, plans: Plans) -> str:
    """The whole page, of the parts that are finished."""
    tables = plans.tables
    allocated = {target: [*plans.allocation[target], *plans.layers[target]] for target in tables}
    every = {target: [*found, *allocated[target]] for target, found in tables.items()}
    sections = [
        heading(asked, book),
        *(budget_section(book, target, found, plans.missed[target]) for target, found in tables.items()),
        heads_section(book, [*plans.heads, *plans.head_controls]),
        control_section(book, tables),
        ordering_section(book, every),
        allocation_section(book, allocated, tables),
        auto_section(book, {target: [*plans.auto[target], *every.get(target, ())] for target in plans.auto}),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def heading(asked: argparse.Namespace, book: Book) -> str:
    """What was measured and how to repeat it."""
    command = (
        f"python benchmarks/methods_table.py --model {asked.model} --corpus {Path(asked.corpus).name} -n {asked.n}"
    )
    rank = f"{asked.router_rank}" if asked.router_rank else "a quarter of the hidden size, as the paper's is"
    return (
        f"# Results: methods at equal bytes on {asked.model}\n\n"
        f"Made by `{command}`{_machines(book)}. Decode regime ([metrics](../metrics.md)): the first {asked.n} blocks of"
        f" 512 tokens, prompts of 256 tokens dense, calibration on the next {asked.n} blocks. Trained routers"
        f" (`dejavu`, `moefication`, `heads-router`) learn from {asked.router_tokens} tokens of the next"
        f" {asked.router_blocks} blocks in at most {asked.router_epochs} epochs at a rate of"
        f" {asked.router_rate:g}; rank of `dejavu`: {rank}. Perplexity with its 95 %"
        f" interval over blocks; *local error* is the mean relative error of a"
        " projection's (or the MLP's) output on dense inputs, comparable among methods over the same units alone."
        " `random`, `channels-random` and `heads-random` are means of three seeds. A *ruler* needs what it saves."
    )


def _machines(book: Book) -> str:
    """Where the parts were measured, and in which numbers."""
    told = {f"{run.summary['device']['name']}, {run.summary['model']['dtype']}" for run in book.runs}
    return f" on {' and '.join(sorted(told))}" if told else ""


def _model(asked: argparse.Namespace) -> ModelSpec:
    return ModelSpec(name=asked.model, device=asked.device, dtype=asked.dtype)


def _plans(asked: argparse.Namespace, output: Output) -> Plans:
    loaded = load(_model(asked), output.note)
    shares = Shares(loaded)
    training = f"tokens={asked.router_tokens},epochs={asked.router_epochs},rate={asked.router_rate:g}"
    rank = asked.router_rank or max(1, loaded.record.hidden_size // 4)
    dejavu = [one for one in DEJAVU if one in asked.routers]
    experts = [one for one in EXPERTS if one in asked.routers]
    routers = {
        target: entries(shares, dejavu, target, f"{training},rank={rank}") + entries(shares, experts, target, training)
        for target in TABLE
    }
    fitted = {part: {target: entries(shares, labels, target) for target in TABLE} for part, labels in FITTED.items()}
    names = [
        *(label for labels in FITTED.values() for label in labels),
        *dejavu,
        *experts,
        "heads-oracle",
        "heads-router",
        "heads-static",
        "heads-random",
    ]
    reached = {
        target: {one.label for one in (*routers[target], *(e for part in fitted.values() for e in part[target]))}
        for target in TABLE
    }
    return Plans(
        fitted,
        routers,
        shares.heads("heads-oracle") + shares.heads("heads-router", training),
        shares.heads("heads-static") + shares.heads("heads-random"),
        {target: entries(shares, ALLOCATED, target) for target in TABLE},
        {target: entries(shares, BY_LAYER, target) for target in TABLE},
        {target: entries(shares, ("auto", *SINGLE), target) for target in sorted({*BUDGETS, *TABLE})},
        {target: [name for name in names if name not in reached[target]] for target in TABLE},
    )


def _evaluate(asked: argparse.Namespace, part: str, folder: Path, plans: Sequence[str], output: Output) -> EvalRun:
    more = (asked.n, asked.n + asked.router_blocks) if part in ("routers", "heads") else None
    spec = EvalSpec(
        model=_model(asked),
        data=DataSpec(corpus=asked.corpus, limit=asked.n, calib_blocks=more),
        plans=tuple(dict.fromkeys(plans)),
        controls=False,
        generations=0,
        timing_pairs=0,
        output=folder,
    )
    return evaluate(spec, output)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("-n", type=int, default=4, help="blocks scored, and as many fitted on")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--routers", nargs="+", choices=[*DEJAVU, *EXPERTS], default=[*DEJAVU, *EXPERTS])
    parser.add_argument("--router-blocks", type=int, default=8, help="blocks that routers learn from")
    parser.add_argument("--router-tokens", type=int, default=4096)
    parser.add_argument("--router-epochs", type=int, default=5)
    parser.add_argument("--router-rate", type=float, default=3e-3, help="the paper's 1e-4 wants many more steps")
    parser.add_argument("--router-rank", type=int, default=0, help="0: a quarter of the hidden size")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--page-only", action="store_true", help="write the page from the parts finished under --runs")
    parser.add_argument("--verbose", action="store_true", help="how long each step took")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/methods/results.md"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
