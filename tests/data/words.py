"""A tokenizer of 100 words made in code, with or without BOS, and texts of these words."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

BOS, UNKNOWN = 0, 1
FIRST = 2


def tokenizer(*, bos: bool, chat: bool = False) -> PreTrainedTokenizerFast:
    """Words `w0` to `w99` are tokens 2 to 101; anything else is token 1."""
    vocabulary = {"<s>": BOS, "<unk>": UNKNOWN} | {f"w{i}": FIRST + i for i in range(100)}
    made = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    if bos:
        made.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")
    if chat:
        wrapped.chat_template = "<s> {% for m in messages %}{{ m.content }} {% endfor %}w99"
    return wrapped


def text(*numbers: int) -> str:
    return " ".join(f"w{number % 100}" for number in numbers)


def ids(*numbers: int) -> list[int]:
    return [FIRST + number % 100 for number in numbers]
