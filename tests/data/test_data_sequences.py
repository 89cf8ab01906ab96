import pytest
import torch
from words import BOS, ids, text, tokenizer

from actsparse.data.prompts import Prompt
from actsparse.data.sequences import WINDOW, adds_bos, blocks_of, from_prompts, read_corpus, shares_text, window_hashes
from actsparse.errors import DataError


def blocks(content: str, *, bos: bool, length: int = 8):
    return blocks_of(
        content, tokenizer(bos=bos), block_length=length, prompt_length=4, source="corpus", role="quality"
    )  # fmt: skip


def sequences(*prompts: str | Prompt, bos: bool = False, max_length: int | None = None, chat: bool = False):
    said: list[str] = []
    given = [Prompt(source=f"p{i}", text=p) if isinstance(p, str) else p for i, p in enumerate(prompts)]
    made = tokenizer(bos=bos, chat=chat)
    found = from_prompts(given, made, max_length=max_length, source="s", role="profile", notify=said.append)
    return found, said


def lists(found) -> list[list[int]]:
    return [one.tolist() for one in found.ids]


@pytest.mark.parametrize("bos", [True, False])
def test_bos_is_what_the_tokenizers_own_call_adds(bos):
    assert adds_bos(tokenizer(bos=bos)) is bos


def test_without_bos_a_block_holds_s_tokens_and_the_last_partial_one_is_dropped():
    found = blocks(text(*range(27)), bos=False)
    assert lists(found) == [ids(*range(8)), ids(*range(8, 16)), ids(*range(16, 24))]


def test_with_bos_a_block_holds_bos_and_s_minus_one_tokens():
    found = blocks(text(*range(27)), bos=True)
    assert lists(found) == [[BOS, *ids(*range(start, start + 7))] for start in (0, 7, 14)]


@pytest.mark.parametrize(("bos", "needed"), [(False, 8), (True, 7)])
def test_a_text_of_exactly_one_block_is_enough_and_one_token_less_is_not(bos, needed):
    assert len(blocks(text(*range(needed)), bos=bos)) == 1
    with pytest.raises(DataError, match="too few for one block of 8") as refused:
        blocks(text(*range(needed - 1)), bos=bos)
    assert "--block-length" in refused.value.hint


def test_crlf_is_read_as_lf():
    windows, plain = blocks("w1\r\nw2 " * 9, bos=False), blocks("w1\nw2 " * 9, bos=False)
    assert lists(windows) == lists(plain)
    assert windows.record == plain.record


def test_the_record_of_blocks_counts_and_hashes_what_was_cut():
    content = text(*range(27))
    found = blocks(content, bos=True)
    record = found.record
    assert (record.sequences, record.tokens, record.blocks) == (3, 24, (0, 3))
    assert (record.block_length, record.prompt_length, record.role, record.source) == (8, 4, "quality", "corpus")
    assert record.sha256 == blocks(text(*range(26)), bos=True).record.sha256, "what is not used changes nothing"
    assert record.sha256 != found.take([0, 2]).record.sha256
    assert record.sha256 != blocks(content, bos=False).record.sha256


def test_taking_blocks_keeps_a_record_of_exactly_these():
    found = blocks(text(*range(80)), bos=False)
    taken = found.take([1, 3], (1, 4))
    assert lists(taken) == [ids(*range(8, 16)), ids(*range(24, 32))]
    assert (taken.record.sequences, taken.record.tokens, taken.record.blocks) == (2, 16, (1, 4))
    assert taken.stack().shape == (2, 8)


@pytest.mark.parametrize("bos", [True, False])
def test_a_prompt_is_one_sequence_with_the_tokenizers_own_special_tokens(bos):
    found, said = sequences("w1 w2 w3", "w4", bos=bos)
    front = [BOS] if bos else []
    assert lists(found) == [[*front, *ids(1, 2, 3)], [*front, *ids(4)]]
    assert (found.record.sequences, found.record.tokens, found.tokens) == (2, 4 + 2 * bos, 4 + 2 * bos)
    assert said == []


def test_a_prompt_longer_than_the_context_is_split_and_said_so():
    found, said = sequences(text(*range(10)), "w5", text(*range(4)), max_length=4)
    assert lists(found) == [ids(0, 1, 2, 3), ids(4, 5, 6, 7), ids(8, 9), ids(5), ids(0, 1, 2, 3)]
    assert len(said) == 1
    assert "p0" in said[0]
    assert "10 tokens" in said[0]
    assert "3 sequences" in said[0]
    assert found.record.sequences == 5


def test_messages_go_through_the_chat_template_without_a_second_bos():
    chat = Prompt(source="c", messages=({"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}))
    found, _ = sequences(chat, bos=True, chat=True)
    assert lists(found) == [[BOS, *ids(1, 2, 99)]]
    plain, said = sequences(chat)
    assert lists(plain) == [ids(1, 2)]
    assert "no chat template: read as plain text" in said[0]


@pytest.mark.parametrize("max_length", [None, 8])
def test_a_prompt_without_tokens_is_left_out_and_does_not_crash(max_length):
    found, _ = sequences("w1 w2", "\u00a0", max_length=max_length)
    assert lists(found) == [ids(1, 2)]


def test_the_hash_of_prompts_is_that_of_their_content_in_order():
    one, two = sequences("w1", "w2")[0].record, sequences("w2", "w1")[0].record
    assert one.sha256 != two.sha256
    assert one.sha256 == sequences("w1", "w2")[0].record.sha256
    assert one.sha256 != sequences("w1 w2")[0].record.sha256


def test_a_corpus_file_is_read_whole_and_its_faults_are_said(tmp_path):
    (tmp_path / "c.txt").write_text("w1\n\nw2")
    assert read_corpus(str(tmp_path / "c.txt")) == ("w1\n\nw2", "c.txt")
    for name, content, said in (("e.txt", b" ", "empty"), ("x.txt", b"\xff", "UTF-8")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=said):
            read_corpus(str(tmp_path / name))
    for missing in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(DataError, match="no file"):
            read_corpus(str(missing))


# Overlap of texts


def random_ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 50_000, (count,), generator=torch.Generator().manual_seed(seed))


def test_equal_windows_have_equal_hashes_wherever_they_stand():
    passage = random_ids(600, 0)
    alone = set(window_hashes([passage]))
    inside = set(window_hashes([torch.cat([random_ids(123, 1), passage, random_ids(77, 2)])]))
    assert len(alone) > 5
    assert alone <= inside


def test_about_one_window_in_thirty_two_is_kept():
    assert 0.6 < len(window_hashes([random_ids(20_000, 0)])) / (20_000 / 32) < 1.4


def test_different_texts_and_short_ones_share_nothing():
    assert not set(window_hashes([random_ids(5000, 0)])) & set(window_hashes([random_ids(5000, 1)]))
    assert window_hashes([random_ids(WINDOW - 1, 0)]) == ()
    assert window_hashes([]) == ()


def test_a_text_that_holds_a_passage_of_another_shares_text_with_it():
    numbers = random_ids(2000, 3).tolist()
    whole = blocks(text(*numbers), bos=False, length=500)
    part = blocks(text(*range(50), *numbers[700:1200], *range(50)), bos=False, length=300)
    other = blocks(text(*random_ids(2000, 4).tolist()), bos=False, length=500)
    assert shares_text(whole.record, part.record)
    assert shares_text(part.record, whole.record)
    assert not shares_text(whole.record, other.record)
