"""The option groups of `actsparse evaluate`; each checks its own values."""

from dataclasses import dataclass
from typing import Annotated

from actsparse.cli.options import RUN, at_least, counts, option, share
from actsparse.errors import ActsparseError

TASKS, STUDY, THROUGHPUT = "Tasks", "Study", "Throughput"


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is measured against dense."""

    plan: Annotated[
        list[str] | None,
        option("--plan", help="A plan directory, griffin@0.5, or a sweep griffin@0.1:0.9:0.1. Repeatable.", panel=RUN),
    ] = None
    controls: Annotated[
        bool, option("--controls/--no-controls", help="Random and static pruning at equal density.", panel=RUN)
    ] = True

    @property
    def names(self) -> tuple[str, ...]:
        """The plans that were named, else the usual one."""
        return tuple(self.plan or ("griffin@0.5",))


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What is generated and timed."""

    max_new_tokens: Annotated[int, option("--max-new-tokens", help="Tokens of a sample.", panel=RUN)] = 48
    generations: Annotated[int, option("--generations", help="Prompts continued as samples.", panel=RUN)] = 3
    temperature: Annotated[
        float, option("--temperature", help="Draw the samples at this temperature; 0 is greedy.", panel=RUN)
    ] = 0.0
    top_p: Annotated[
        float, option("--top-p", help="Draw from the fewest tokens that hold this probability.", panel=RUN)
    ] = 1.0
    timing_pairs: Annotated[
        int, option("--timing-pairs", help="Pairs of dense and sparse laps; 0 leaves timing out.", panel=RUN)
    ] = 7
    timing_tokens: Annotated[int, option("--timing-tokens", help="Decoded tokens of a lap.", panel=RUN)] = 12
    timing_prompts: Annotated[int, option("--timing-prompts", help="Prompts that are timed.", panel=RUN)] = 1
    fast_atomics: Annotated[
        bool, option("--fast-atomics", help="GPU: add in any order; faster, bits vary.", panel=RUN)
    ] = False

    def check(self) -> None:
        """Raise ActsparseError on a number that is too small."""
        at_least(1, {"--max-new-tokens": self.max_new_tokens, "--timing-tokens": self.timing_tokens,
                     "--timing-prompts": self.timing_prompts})  # fmt: skip
        at_least(0, {"--generations": self.generations, "--timing-pairs": self.timing_pairs})
        if self.temperature < 0:
            raise ActsparseError(f"--temperature must be at least 0, not {self.temperature:g}", "0 decodes greedily")
        if not 0 < self.top_p <= 1:
            raise ActsparseError(
                f"--top-p is {self.top_p:g}, and must be above 0 and at most 1", "leave it out for all tokens"
            )
        if self.top_p < 1 and not self.temperature:
            raise ActsparseError(
                "--top-p draws nothing without a temperature", f"add --temperature 1 --top-p {self.top_p:g}"
            )


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Which tasks are scored, and how."""

    task: Annotated[
        list[str] | None,
        option("--task", help="JSON lines: query, choices, gold; or question, answer. Repeatable.", panel=TASKS),
    ] = None
    tasks: Annotated[
        str | None, option("--tasks", help="Tasks of lm-eval by name: piqa,gsm8k (extra `eval`).", panel=TASKS)
    ] = None
    include_path: Annotated[
        str | None, option("--include-path", help="Folder with lm-eval tasks of your own.", panel=TASKS)
    ] = None
    task_limit: Annotated[int | None, option("--task-limit", help="Items of each task. [all]", panel=TASKS)] = None
    task_tokens: Annotated[int, option("--task-tokens", help="Tokens of an answer, at most.", panel=TASKS)] = 256
    shots: Annotated[int, option("--shots", help="Items shown as examples first.", panel=TASKS)] = 0
    dense_upto: Annotated[
        str, option("--dense-upto", help="P: the whole context is dense; P-1: its last token is sparse.", panel=TASKS)
    ] = "P"

    @property
    def names(self) -> tuple[str, ...]:
        """The names that `--tasks` lists."""
        return tuple(name.strip() for name in (self.tasks or "").split(",") if name.strip())

    def check(self) -> None:
        """Raise ActsparseError on a number that is too small."""
        at_least(1, {"--task-tokens": self.task_tokens, "--task-limit": self.task_limit})
        at_least(0, {"--shots": self.shots})


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """The experiments of a paper."""

    study: Annotated[
        str | None,
        option(
            "--study", help="A paper's experiments instead: pitfalls, moyu, tda, frontier, window, union.", panel=STUDY
        ),
    ] = None
    quick: Annotated[bool, option("--quick", help="Small sizes, minutes on two cores.", panel=STUDY)] = False
    only: Annotated[str | None, option("--only", help="Some experiments of the study: T1,T4.", panel=STUDY)] = None
    counterpart: Annotated[
        str | None, option("--counterpart", help="The model with the other activation, for P1 and P5.", panel=STUDY)
    ] = None

    @property
    def names(self) -> tuple[str, ...]:
        """The experiments that `--only` lists."""
        return tuple(part.strip() for part in (self.only or "").split(",") if part.strip())

    def check(self, others: dict[str, object]) -> None:
        """Raise ActsparseError where options of a study stand without one, or `others` beside one."""
        if self.study is None:
            given = {"--quick": self.quick, "--only": self.only, "--counterpart": self.counterpart}
            for name in (name for name, value in given.items() if value):
                raise ActsparseError(f"{name} belongs to a study", "name one with --study pitfalls")
        else:
            for name in (name for name, value in others.items() if value):
                raise ActsparseError(f"{name} does not go with --study", "a study names its own plans; leave it out")


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions:
    """The sizes at which decoding is timed."""

    throughput: Annotated[
        bool, option("--throughput", help="Time dense and plans at the sizes below.", panel=THROUGHPUT)
    ] = False
    batch_sizes: Annotated[
        str, option("--batch-sizes", help="Sequences decoded together, up to 8 on a CPU.", panel=THROUGHPUT)
    ] = "1,2,4,8"
    prompt_lengths: Annotated[str, option("--prompt-lengths", help="Tokens of a prompt.", panel=THROUGHPUT)] = (
        "128,512,2048"
    )
    gen_lengths: Annotated[str, option("--gen-lengths", help="Tokens generated after it.", panel=THROUGHPUT)] = (
        "32,128,512"
    )

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes; raises ActsparseError where one is no count. So do `prompts` and `lengths`."""
        return counts(self.batch_sizes, "--batch-sizes")

    @property
    def prompts(self) -> tuple[int, ...]:
        """The prompt lengths."""
        return counts(self.prompt_lengths, "--prompt-lengths")

    @property
    def lengths(self) -> tuple[int, ...]:
        """The generated lengths."""
        return counts(self.gen_lengths, "--gen-lengths")


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """When the command fails because quality is lost."""

    max_ppl_increase: Annotated[
        str | None, option("--max-ppl-increase", help="Exit with 3 when a plan is worse: 5% or 0.05.", panel=RUN)
    ] = None
    min_top1: Annotated[
        str | None, option("--min-top1", help="Exit with 3 when a plan agrees less: 0.9.", panel=RUN)
    ] = None

    @property
    def ppl(self) -> float | None:
        """The increase that is allowed; raises ActsparseError where it is no share."""
        return None if self.max_ppl_increase is None else share(self.max_ppl_increase, "--max-ppl-increase")

    @property
    def top1(self) -> float | None:
        """The agreement that is asked for; raises ActsparseError where it is no share."""
        return None if self.min_top1 is None else share(self.min_top1, "--min-top1")
