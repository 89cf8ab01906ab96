"""The grid of prompts that the training text answers: templates of our own, filled from word lists.

The kinds are short everyday English: stories, fables, dialogue, descriptions, explanations,
instructions, lists, letters, opinions, reports. Code, long arithmetic and other languages are not
in it.
"""

import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

MOST_USES = 6
ARTICLE = re.compile(r"\b([Aa]) (?=[aeio]|u[mn]|honest)")
SLOT = re.compile(r"\{(\w+)\}")
TEMPLATES = Path(__file__).with_name("templates.txt")
WORDS = Path(__file__).with_name("words.txt")


def prompts(count: int, seed: int) -> list[str]:
    """`count` prompts in random order, each kind by its share, none more than `MOST_USES` times.

    A kind whose combinations run out leaves its share to the others.
    """
    chooser = random.Random(seed)
    kinds = _sections(TEMPLATES)
    shares = [float(title.split()[1]) for title in kinds]
    templates = list(kinds.values())
    uses: Counter[str] = Counter()
    drawn: list[str] = []
    while len(drawn) < count:
        (kind,) = chooser.choices(templates, weights=shares)
        text = _fill(chooser.choice(kind), chooser)
        uses[text] += 1
        if uses[text] <= MOST_USES:
            drawn.append(text)
    return drawn


def _fill(template: str, chooser: random.Random) -> str:
    used: set[str] = set()

    def word(slot: re.Match[str]) -> str:
        chosen = chooser.choice([word for word in _words()[slot[1]] if word not in used])
        used.add(chosen)
        return chosen

    text = ARTICLE.sub(r"\1n ", SLOT.sub(word, template))
    return text[0].upper() + text[1:]


@cache
def _words() -> dict[str, tuple[str, ...]]:
    return {
        name: tuple(word.strip() for line in lines for word in line.split(";") if word.strip())
        for name, lines in _sections(WORDS).items()
    }


def _sections(path: Path) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in filter(None, map(str.strip, path.read_text().splitlines())):
        if line.startswith("["):
            sections[line.strip("[]")] = lines = []
        else:
            lines.append(line)
    return sections


def main() -> None:
    grid = prompts(400_000, 0)
    print(f"{len(set(grid)):,} distinct of {len(grid):,}")
    print("\n".join(grid[:60]))


if __name__ == "__main__":
    main()
