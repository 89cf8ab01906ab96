"""Samples answers of SmolLM2-135M-Instruct to the grid of prompts: `python -m actsparse.twins.train.sample --help`.

Every row of the batch is always at work: a row that ends its answer takes the next prompt, on the
device, inside the captured step. The host only replays the graph and copies the log of tokens.
A row that repeats itself is given up at once: half of the answers would otherwise loop to the limit.
"""

import argparse
import json
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from actsparse.twins.train.decode import Decoder
from actsparse.twins.train.documents import IM_END, write_shards
from actsparse.twins.train.prompts import prompts
from actsparse.twins.train.source import read_model, read_tokenizer

CHUNK = 256  # steps between two looks at the clock
REPEAT = 10  # an answer that holds the same so many tokens twice is given up
FORCED = -1  # logged while a row is still reading its prompt
FIRST_PLAIN = 17  # lower ids are control tokens
PROMPT_WIDTH = 112
MIN_ANSWER = 48  # tokens
MAX_COMPRESSION = 2.5  # of an answer by zlib; higher repeats itself with small changes
TEMPLATE = (
    "<|im_start|>system\nYou write clear, simple English. Answer in one or two short paragraphs.<|im_end|>\n"
    "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    rows: int
    positions: int
    temperature: float
    min_p: float
    seed: int
    prompts: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Yield:
    """What a run gave, in tokens of the source model's vocabulary."""

    seconds: float
    sampled_tokens: int
    sampled_tokens_per_second: float
    answers: int
    kept: int
    kept_tokens: int
    given_up: int
    short_or_looping: int
    duplicates: int


class Sampler:
    """The captured step and its state: one token, position and prompt a row."""

    def __init__(
        self,
        decoder: Decoder,
        settings: Settings,
        table: Int[Tensor, "prompts prompt_width"],
        lengths: Int[Tensor, " prompts"],
    ) -> None:
        self._decoder, self._settings = decoder, settings
        self._table, self._lengths = table, lengths
        rows, device = settings.rows, table.device
        self._prompt = torch.arange(rows, device=device) % len(table)
        self._token = table[self._prompt, 0].clone()
        self._position = torch.zeros(rows, dtype=torch.long, device=device)
        self._cursor = torch.full((1,), rows, dtype=torch.long, device=device)
        self._tick = torch.zeros(1, dtype=torch.long, device=device)
        self._tokens = torch.zeros(CHUNK, rows, dtype=torch.int32, device=device)
        self._prompts = torch.zeros(CHUNK, rows, dtype=torch.int32, device=device)
        self._repeats = Repeats(rows, settings.positions, device)
        self._draw = torch.compile(draw, dynamic=False) if table.is_cuda else draw
        self._replay = self._capture() if table.is_cuda else self._step

    def chunk(self) -> tuple[Int[Tensor, "steps batch"], Int[Tensor, "steps batch"]]:
        """The next `CHUNK` tokens of every row, and the prompts that they answer."""
        self._tick.zero_()
        for _ in range(CHUNK):
            self._replay()
        return self._tokens.cpu(), self._prompts.cpu()

    def _capture(self) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def _step(self) -> None:
        logits = self._decoder(self._token, self._position)
        drawn = self._draw(logits, self._settings.temperature, self._settings.min_p)
        following = self._position + 1
        forced = following < self._lengths[self._prompt]
        column = following.clamp(max=self._table.shape[1] - 1)
        token = torch.where(forced, self._table[self._prompt, column], drawn)
        self._tokens.index_copy_(0, self._tick, token.where(~forced, FORCED).int()[None])
        self._prompts.index_copy_(0, self._tick, self._prompt.int()[None])
        self._tick += 1
        ended = (~forced & (drawn == IM_END)) | (following >= self._settings.positions)
        ended |= self._repeats.found(token, self._position, forced)
        self._refill(token, following, ended)

    def _refill(
        self,
        token: Int[Tensor, " batch"],
        following: Int[Tensor, " batch"],
        ended: Bool[Tensor, " batch"],
    ) -> None:
        order = ended.cumsum(0)
        fresh = (self._cursor + order - 1) % len(self._table)
        self._cursor += order[-1]
        self._prompt.copy_(torch.where(ended, fresh, self._prompt))
        self._token.copy_(torch.where(ended, self._table[self._prompt, 0], token))
        self._position.copy_(following.where(~ended, 0))
        self._repeats.forget(ended)


class Repeats:
    """Finds rows whose last `REPEAT` tokens they have said before, by a hash of every such run."""

    def __init__(self, rows: int, positions: int, device: torch.device) -> None:
        self._factors = torch.randint(1 << 40, (REPEAT,), device=device)
        self._recent = torch.zeros(rows, REPEAT, dtype=torch.long, device=device)
        self._hashes = torch.zeros(rows, positions, dtype=torch.long, device=device)

    def found(
        self, token: Int[Tensor, " batch"], position: Int[Tensor, " batch"], forced: Bool[Tensor, " batch"]
    ) -> Bool[Tensor, " batch"]:
        """Whether `token`, drawn at `position`, closes a run already said; the run is remembered."""
        self._recent.copy_(torch.cat([self._recent[:, 1:], token[:, None]], dim=1))
        run = (self._recent * self._factors).sum(1)
        known = (self._hashes == run[:, None]).any(1) & ~forced
        self._hashes.scatter_(1, position[:, None], run[:, None])
        return known

    def forget(self, ended: Bool[Tensor, " batch"]) -> None:
        """Empties the rows that begin anew."""
        self._recent.masked_fill_(ended[:, None], 0)
        self._hashes.masked_fill_(ended[:, None], 0)


def draw(logits: Float[Tensor, "batch vocab"], temperature: float, min_p: float) -> Int[Tensor, " batch"]:
    """A token a row: the Gumbel trick over the tokens with at least `min_p` of the top's chance."""
    scaled = logits.float() / temperature
    likely = scaled >= scaled.amax(-1, keepdim=True) + np.log(min_p)
    gumbel = -torch.log(-torch.log(torch.rand_like(scaled)))
    return torch.where(likely, scaled + gumbel, float("-inf")).argmax(-1)


def prompt_table(
    tokenizer: Tokenizer, texts: list[str], device: torch.device
) -> tuple[Int[Tensor, "prompts prompt_width"], Int[Tensor, " prompts"]]:
    """Token ids of the templated prompts, padded, and their lengths."""
    encoded = tokenizer.encode_batch([TEMPLATE.format(prompt=text) for text in texts])
    table = np.zeros((len(texts), PROMPT_WIDTH), np.int64)
    for row, item in zip(table, encoded, strict=True):
        if len(item.ids) > PROMPT_WIDTH:
            raise ValueError(f"a prompt of {len(item.ids)} tokens exceeds {PROMPT_WIDTH}: {item}")
        row[: len(item.ids)] = item.ids
    lengths = torch.tensor([len(item.ids) for item in encoded], device=device)
    return torch.from_numpy(table).to(device), lengths


def answers(tokens: NDArray[np.int32], owners: NDArray[np.int32]) -> list[tuple[int, NDArray[np.uint16]]]:
    """(prompt, answer ids) of every answer in the logs [steps, rows], finished or not."""
    begins = np.flatnonzero(np.diff(owners.T, axis=1, prepend=-1))
    pieces = np.split(tokens.T.ravel(), begins[1:])
    who = owners.T.ravel()[begins]
    return [(int(prompt), piece[piece != FORCED].astype(np.uint16)) for prompt, piece in zip(who, pieces, strict=True)]


def keep(
    found: list[tuple[int, NDArray[np.uint16]]], tokenizer: Tokenizer, texts: list[str]
) -> tuple[list[tuple[NDArray[np.uint16], NDArray[np.uint16]]], dict[str, int]]:
    """(prompt ids, answer ids) of finished, sound, distinct answers; and how many were dropped."""
    finished = [(who, ids[:-1]) for who, ids in found if len(ids) > 1 and ids[-1] == IM_END]
    finished = [item for item in finished if item[1].min() >= FIRST_PLAIN]
    decoded = tokenizer.decode_batch([ids.tolist() for _, ids in finished])
    prompt_ids = tokenizer.encode_batch([texts[who] for who, _ in finished])
    kept, seen, unsound, duplicates = [], set(), 0, 0
    for (_, ids), prompt, text in zip(finished, prompt_ids, decoded, strict=True):
        key = hash(" ".join(text.lower().split()))
        if len(ids) < MIN_ANSWER or _compression(text) > MAX_COMPRESSION:
            unsound += 1
        elif key in seen:
            duplicates += 1
        else:
            seen.add(key)
            kept.append((np.array(prompt.ids, np.uint16), ids))
    given_up = len(found) - len(finished)
    return kept, {
        "given_up": given_up,
        "short_or_looping": unsound,
        "duplicates": duplicates,
    }


def _compression(text: str) -> float:
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw, 6))


def run(settings: Settings, source: Path, output: Path) -> Yield:
    """What was sampled into `output`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    model = read_model(source, device, torch.bfloat16)
    tokenizer = read_tokenizer(source)
    texts = prompts(settings.prompts, settings.seed)
    decoder = Decoder(model, settings.rows, settings.positions)
    sampler = Sampler(decoder, settings, *prompt_table(tokenizer, texts, device))
    logs, start = [], time.perf_counter()
    while (elapsed := time.perf_counter() - start) < settings.seconds:
        logs.append(sampler.chunk())
        print(f"{elapsed:6.1f} s  {len(logs) * CHUNK * settings.rows:>12,} steps", flush=True)
    elapsed = time.perf_counter() - start
    tokens, owners = (torch.cat(log).numpy() for log in zip(*logs, strict=True))
    found = answers(tokens, owners)
    kept, dropped = keep(found, tokenizer, texts)
    write_shards(output, kept)
    sampled = int((tokens != FORCED).sum())
    return Yield(
        seconds=elapsed,
        sampled_tokens=sampled,
        sampled_tokens_per_second=sampled / elapsed,
        answers=len(found),
        kept=len(kept),
        kept_tokens=sum(len(ids) for _, ids in kept),
        **dropped,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="SmolLM2-135M-Instruct as GGUF")
    parser.add_argument("output", type=Path, help="folder for the shards and sample.json")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--positions", type=int, default=512, help="prompt and answer together")
    parser.add_argument("--temperature", type=float, default=0.75)
    parser.add_argument("--min-p", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=800_000)
    parser.add_argument("--seconds", type=float, default=440.0)
    arguments = vars(parser.parse_args())
    source, output = arguments.pop("source"), arguments.pop("output")
    settings = Settings(**arguments)
    output.mkdir(parents=True, exist_ok=True)
    record = {"settings": asdict(settings), "yield": asdict(run(settings, source, output))}
    (output / "sample.json").write_text(json.dumps(record, indent=1))
    print(json.dumps(record["yield"], indent=1))


if __name__ == "__main__":
    main()
