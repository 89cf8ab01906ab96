"""Chat messages as text, by the template that comes with a tokenizer: a program of a stranger.

transformers runs it in Jinja's sandbox, which bounds what it can reach, and neither its time nor its memory. So it runs
in a process of its own under limits of the system: this file, as a script that reads and writes one JSON document.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from actsparse.data.prompts import Prompt
from actsparse.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 20
CHATS_A_SECOND = 100
BYTES = 2 * 2**30
NO_MEMORY = 3  # exit code of the child
# A text may be so many characters longer than its messages: prompts of the system, dates, marks of roles.
MOST_ADDED = 2**20


def as_text(chats: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The messages of every prompt as the text that the model is to continue.

    Raises DataError where the template refuses one (named by its source), or passes a limit of time, memory or length.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(f"the model has no chat template that can be used: {error}", "give plain text") from None
    asked = {
        "seconds": SECONDS + len(chats) // CHATS_A_SECOND,
        "conversations": [list(chat.messages) for chat in chats],
        "template": template,
        "tokens": tokenizer.special_tokens_map,
    }
    found = _in_a_child(asked)
    for chat, rendered in zip(chats, found, strict=True):
        if "error" in rendered:
            raise DataError(
                f"{chat.source}: the model's chat template refuses these messages: {rendered['error']}",
                "change the roles, or give plain text in a field 'text'",
            )
    return [rendered["text"] for rendered in found]


def _in_a_child(asked: dict[str, Any]) -> list[dict[str, str]]:
    """What `_render` makes of a document, for every conversation a `text` or an `error`."""
    seconds, done = asked["seconds"], None
    with suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [sys.executable, "-P", __file__],
            input=json.dumps(asked, default=str),
            capture_output=True,
            text=True,
            timeout=10 * seconds,  # the child is stopped by its own seconds, which a busy machine spreads out
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            check=False,
        )
    if done is None or done.returncode < 0 or done.returncode == NO_MEMORY:
        raise DataError(
            f"the model's chat template passes the limits of {seconds} s and {BYTES // 2**30} GB",
            "do not trust this tokenizer, or give plain text in a field 'text'",
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise DataError(f"the model's chat template cannot be run: {reason}", "give plain text in a field 'text'")
    return json.loads(done.stdout)


def _render(asked: dict[str, Any]) -> list[dict[str, str]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    found = []
    for messages in asked["conversations"]:
        try:
            texts, _ = render_jinja_template(
                [messages], chat_template=asked["template"], add_generation_prompt=True, **asked["tokens"]
            )
            most = sum(len(value) for message in messages for value in message.values()) + MOST_ADDED
            if len(texts[0]) > most:
                found.append({"error": f"it makes {len(texts[0]):,} characters of them"})
            else:
                found.append({"text": texts[0]})
        except MemoryError:
            raise
        except Exception as error:  # whatever a template does
            found.append({"error": (str(error).strip().splitlines() or [type(error).__name__])[0][:500]})
    return found


def _limit(kind: int, most: int) -> None:
    """Bound what this process may take; a harder limit that it was started under stays."""
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    document = json.load(sys.stdin)
    _limit(resource.RLIMIT_CPU, document["seconds"])
    _limit(resource.RLIMIT_AS, BYTES)
    try:
        answer = json.dumps(_render(document))
    except MemoryError:
        sys.exit(NO_MEMORY)
    with os.fdopen(1, "w", encoding="utf-8") as parent:
        parent.write(answer)
