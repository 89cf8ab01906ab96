"""`actsparse methods`."""

import json
import re
from pathlib import Path

import pytest

from actsparse.cli.app import main
from actsparse.methods.registry import all_methods
from actsparse.models.families import FAMILIES


def test_every_method_is_listed_with_what_it_needs_and_saves(capsys: pytest.CaptureFixture) -> None:
    assert main(["methods", "--json"]) == 0
    found = {one["method"]: one for one in json.loads(capsys.readouterr().out)}
    assert list(found) == list(all_methods())
    facts = {name: (one["decides"], one["reads"], one["saves"], one["fitted_on"]) for name, one in found.items()}
    assert facts["chess"] == ("per token", ["gate", "up"], ["up", "down"], "text")
    assert facts["countdown"] == ("per token", ["up"], ["gate", "down"], "profile")
    assert facts["cett"] == ("per token", ["neuron"], ["down"], "text")
    assert facts["griffin"] == ("end of prefill", ["neuron"], ["gate", "up", "down"], "nothing")
    assert facts["oracle-a"] == ("per token", ["neuron"], [], "nothing")
    assert {name for name, one in found.items() if one["gated_only"]} == {
        "oracle-gate", "oracle-up", "chess", "countdown",
    }  # fmt: skip
    assert {name for name, one in found.items() if one["ideal"]} == {
        "oracle-a", "oracle-n", "oracle-gate", "oracle-up", "heads-oracle",
    }  # fmt: skip
    assert facts["heads-router"] == ("per token", ["attn_in"], ["q", "o"], "text")
    assert found["tda"]["options"] == {
        "source": {"type": "choice", "default": "a", "values": ["a", "n", "gate", "up"]},
        "first": {"type": "int", "default": 0, "values": []},
        "refresh_every": {"type": "int", "default": 0, "values": []},
        "length_aware": {"type": "bool", "default": False, "values": []},
    }


def test_the_table_says_what_has_an_engine(capsys: pytest.CaptureFixture) -> None:
    assert main(["methods"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name, cls in all_methods().items():
        assert lines[name].rstrip().endswith("engine" if cls.has_engine else "masked only")
    assert "nothing (ruler)" in lines["oracle-n"]


def test_one_method_shows_its_options(capsys: pytest.CaptureFixture) -> None:
    assert main(["methods", "coreinfer"]) == 0
    out = capsys.readouterr().out
    assert "token_frac=0.4  (float)" in out
    assert "arXiv 2410.18311" in out
    assert "griffin" not in out


def test_a_name_that_is_no_method_has_a_hint(capsys: pytest.CaptureFixture) -> None:
    assert main(["methods", "chss"]) == 1
    assert "did you mean 'chess'?" in capsys.readouterr().err


def test_the_page_of_methods_says_which_ffns_the_code_serves() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods" / "README.md").read_text()
    for line in page.splitlines():
        if line.startswith("| [`"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for name in re.findall(r"`([a-z-]+)`", cells[0].partition("]")[0]):
                cls = all_methods()[name]
                gated, where = name in ("oracle-gate", "oracle-up"), f"docs/methods/README.md: {name}"
                said = "gated" if gated else cells[5].partition(" ")[0]
                assert said == ("gated" if cls.gated_only else "any" if cls.serves_experts else "dense"), where


def test_the_page_names_the_families_that_some_methods_refuse() -> None:
    page = (Path(__file__).parents[2] / "docs" / "methods" / "README.md").read_text()
    told = re.search(r"`dense` refuses mixtures of experts \(([^)]*)\)", page)
    assert told is not None
    mixtures = {name for name, family in FAMILIES.items() if family.experts is not None}
    assert set(re.findall(r"`([a-z0-9_]+)`", told[1])) == mixtures
