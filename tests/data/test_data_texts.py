from pathlib import Path

import pytest
from words import BOS, ids, text, tokenizer

from actsparse.data.sequences import shares_text
from actsparse.data.texts import TextReader
from actsparse.errors import DataError
from actsparse.specs import DataSpec

S, P = 10, 5


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Nine blocks of ten tokens, w0 to w89."""
    path = tmp_path / "corpus.txt"
    path.write_text(text(*range(93)))
    return str(path)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """Six prompts of twelve tokens; the first token of each says which."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(text(i, *range(20 + i, 31 + i)) for i in range(6)))
    return str(path)


def reader(*, max_positions: int | None = None, bos: bool = False, said: list[str] | None = None, **spec) -> TextReader:
    given = DataSpec(**{"block_length": S, "prompt_length": P} | spec)
    notify = (lambda _: None) if said is None else said.append
    return TextReader(given, tokenizer(bos=bos), max_positions, notify)


def places(found) -> list[int]:
    """Which blocks of the corpus these are."""
    for one in found.ids:
        assert one.tolist() == ids(*range(int(one[0]) - 2, int(one[0]) + 8))
    return [(int(one[0]) - 2) // S for one in found.ids]


# Evaluation on a corpus


def test_scored_are_blocks_0_to_n_and_calibrated_on_the_n_after_them(corpus):
    found = reader(corpus=corpus, limit=3).eval_texts()
    assert places(found.quality) == [0, 1, 2]
    assert places(found.calibration) == [3, 4, 5]
    assert (found.quality.record.blocks, found.calibration.record.blocks) == ((0, 3), (3, 6))
    assert (found.quality.record.role, found.calibration.record.role) == ("quality", "calibration")
    assert found.quality.record.sequences == 3
    assert not shares_text(found.quality.record, found.calibration.record)


def test_without_a_limit_half_of_the_blocks_are_scored(corpus):
    found = reader(corpus=corpus).eval_texts()
    assert places(found.quality) == [0, 1, 2, 3]
    assert places(found.calibration) == [4, 5, 6, 7]


def test_without_a_limit_a_long_text_is_scored_in_part_and_said_so(tmp_path):
    (tmp_path / "long.txt").write_text(text(*range(400)))
    said: list[str] = []
    found = reader(corpus=str(tmp_path / "long.txt"), said=said).eval_texts()
    assert len(found.quality) == 8
    assert any("8 of 40" in line for line in said)


def test_calibration_blocks_can_be_named(corpus):
    found = reader(corpus=corpus, limit=2, calib_blocks=(6, 9)).eval_texts()
    assert places(found.quality) == [0, 1]
    assert places(found.calibration) == [6, 7, 8]
    assert found.calibration.record.blocks == (6, 9)


@pytest.mark.parametrize("wanted", [(7, 10), (5, 5), (6, 3), (-1, 2), (9, 12)])
def test_calibration_blocks_that_are_not_there_are_refused(corpus, wanted):
    with pytest.raises(DataError, match="calibration blocks"):
        reader(corpus=corpus, limit=2, calib_blocks=wanted).eval_texts()


@pytest.mark.parametrize("limit", [5, 9, 10])
def test_a_limit_that_leaves_too_little_for_calibration_is_refused(corpus, limit):
    with pytest.raises(DataError) as refused:
        reader(corpus=corpus, limit=limit).eval_texts()
    assert "--limit" in refused.value.hint


def test_calibration_can_be_another_text_and_then_all_blocks_can_be_scored(corpus, tmp_path):
    (tmp_path / "calib.txt").write_text(text(*range(50, 98)))
    found = reader(corpus=corpus, calib=str(tmp_path / "calib.txt"), limit=9).eval_texts()
    assert places(found.quality) == list(range(9))
    assert [int(one[0]) for one in found.calibration.ids] == ids(50, 60, 70, 80)
    assert found.calibration.record.source == "calib.txt"


@pytest.mark.parametrize(
    ("part", "scored", "fitted"), [("odd", [1, 3, 5, 7], [0, 2, 4, 6]), ("even", [0, 2, 4, 6, 8], [1, 3, 5, 7])]
)
def test_one_half_is_scored_and_the_methods_are_fitted_on_the_other(corpus, part, scored, fitted):
    found = reader(corpus=corpus, part=part).eval_texts()
    assert places(found.quality) == scored
    assert places(found.calibration) == fitted
    limited = reader(corpus=corpus, part=part, limit=2).eval_texts()
    assert places(limited.quality) == scored[:2]
    assert places(limited.calibration) == fitted[:2]


def test_with_only_a_corpus_the_prompts_are_the_first_p_tokens_of_the_scored_blocks(corpus):
    found = reader(corpus=corpus, limit=2).eval_texts()
    assert [one.tolist() for one in found.prompts.ids] == [ids(*range(5)), ids(*range(10, 15))]
    assert found.prompt_length == P


def test_with_a_corpus_and_prompts_each_serves_its_own(corpus, prompts):
    found = reader(corpus=corpus, prompts=(prompts,), limit=2).eval_texts()
    assert places(found.quality) == [0, 1]
    assert [int(one[0]) for one in found.prompts.ids] == ids(*range(6))


def test_bos_stands_in_front_of_blocks_and_prompts(corpus, prompts):
    found = reader(corpus=corpus, prompts=(prompts,), limit=2, bos=True).eval_texts()
    for part in (found.quality, found.calibration, found.prompts):
        assert all(int(one[0]) == BOS and int(one[1]) != BOS for one in part.ids)
    assert all(len(one) == S for one in found.quality.ids)


# Evaluation on prompts


def test_with_only_prompts_they_are_joined_into_a_corpus(prompts):
    found = reader(prompts=(prompts,), limit=2).eval_texts()
    joined = [token for i in range(6) for token in ids(i, *range(20 + i, 31 + i))]
    assert [one.tolist() for one in found.quality.ids] == [joined[:10], joined[10:20]]
    assert [one.tolist() for one in found.calibration.ids] == [joined[20:30], joined[30:40]]
    assert [int(one[0]) for one in found.prompts.ids] == ids(*range(6))


def test_halves_of_prompts_do_not_share_text(prompts):
    found = reader(prompts=(prompts,), part="odd").eval_texts()
    assert [int(one[0]) for one in found.prompts.ids] == ids(1, 3, 5)
    scored = {token for one in found.quality.ids for token in one.tolist()} & set(ids(*range(6)))
    fitted = {token for one in found.calibration.ids for token in one.tolist()} & set(ids(*range(6)))
    assert scored <= set(ids(1, 3, 5))
    assert fitted <= set(ids(0, 2, 4))
    assert fitted


# Profiles


def test_a_profile_of_a_corpus_takes_its_first_blocks(corpus):
    found = reader(corpus=corpus, limit=4).profile_sequences()
    assert places(found) == [0, 1, 2, 3]
    assert (found.record.role, found.record.blocks, found.record.sequences) == ("profile", (0, 4), 4)
    assert places(reader(corpus=corpus).profile_sequences()) == list(range(9))
    assert places(reader(corpus=corpus, part="odd", limit=3).profile_sequences()) == [1, 3, 5]


def test_a_profile_of_prompts_takes_one_sequence_a_prompt(prompts):
    found = reader(prompts=(prompts,), limit=4).profile_sequences()
    assert [int(one[0]) for one in found.ids] == ids(0, 1, 2, 3)
    even = reader(prompts=(prompts,), part="even").profile_sequences()
    assert [int(one[0]) for one in even.ids] == ids(0, 2, 4)


def test_profile_and_evaluation_of_a_run_do_not_meet(corpus, prompts):
    for given in ({"corpus": corpus}, {"prompts": (prompts,)}):
        profiled = reader(**given, part="even").profile_sequences()
        scored = reader(**given, part="odd").eval_texts().quality
        assert not {tuple(one.tolist()) for one in profiled.ids} & {tuple(one.tolist()) for one in scored.ids}


def test_replays_of_a_profile_read_the_text_that_it_read(corpus, prompts):
    assert places(reader(corpus=corpus, limit=4).calibration_blocks()) == [0, 1, 2, 3]
    found = reader(prompts=(prompts,), limit=2).calibration_blocks()
    joined = [*ids(0, *range(20, 31)), *ids(1, *range(21, 32))]
    assert [one.tolist() for one in found.ids] == [joined[:10], joined[10:20]]


def test_without_any_text_the_sample_prompts_are_used_and_said_so():
    said: list[str] = []
    found = reader(said=said, limit=3).profile_sequences()
    assert len(found) == 3
    assert found.record.source == "sample_prompts"
    assert "sample prompts" in said[0]


def test_a_half_without_any_block_is_an_error(tmp_path):
    (tmp_path / "one.txt").write_text(text(*range(12)))
    given = reader(corpus=str(tmp_path / "one.txt"), part="odd")
    with pytest.raises(DataError):
        given.profile_sequences()
    with pytest.raises(DataError):
        given.eval_texts()


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_under_one_is_refused_and_not_taken_for_no_limit(corpus, prompts, limit):
    for given in ({"corpus": corpus}, {"prompts": (prompts,)}):
        with pytest.raises(DataError):
            reader(**given, limit=limit).profile_sequences()
        with pytest.raises(DataError):
            reader(**given, limit=limit).eval_texts()


# Lengths


@pytest.mark.parametrize(
    ("given", "block", "prompt"),
    [
        ({"corpus": "x"}, 512, 256),
        ({}, 256, 128),
        ({"corpus": "x", "block_length": 128}, 128, 64),
        ({"corpus": "x", "prompt_length": 100}, 512, 100),
        ({"block_length": 64}, 64, 32),
    ],
)
def test_default_lengths_of_blocks_and_prompts(given, block, prompt):
    found = TextReader(DataSpec(**given), tokenizer(bos=False), None, lambda _: None)
    assert (found.block_length, found.prompt_length) == (block, prompt)


@pytest.mark.parametrize("prompt_length", [0, 4, S - 1, S, S + 1])
def test_a_prompt_that_leaves_nothing_to_score_or_to_select_from_is_refused(corpus, prompt_length):
    with pytest.raises(DataError, match="leaves nothing") as refused:
        reader(corpus=corpus, prompt_length=prompt_length).eval_texts()
    assert "between 5 and 8" in refused.value.hint


def test_blocks_longer_than_the_context_are_refused(corpus):
    with pytest.raises(DataError, match="context of 9") as refused:
        reader(corpus=corpus, max_positions=9).eval_texts()
    assert "--block-length 9" in refused.value.hint
    assert len(reader(corpus=corpus, max_positions=10).profile_sequences()) == 9


def test_a_data_set_without_a_limit_is_read_so_far_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actsparse.data import texts

    path = tmp_path / "many.txt"
    path.write_text("\n".join(text(i, i + 1, i + 2) for i in range(9)))
    monkeypatch.setattr(texts, "DATASET_ROWS", 6)
    said: list[str] = []
    assert len(reader(dataset=str(path), said=said).profile_sequences()) == 6
    assert any("the first 6 rows" in line and "--limit" in line for line in said)
    said.clear()
    assert len(reader(dataset=str(path), limit=8, said=said).profile_sequences()) == 8
    assert not any("rows" in line for line in said)
