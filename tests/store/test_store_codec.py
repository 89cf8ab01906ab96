import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actsparse import results
from actsparse.errors import RunError
from actsparse.results import LayerPlan, Manifest, Measure, RunKind, param
from actsparse.specs import DataSpec, EvalSpec, ModelSpec, ProfileSpec, ThresholdSpec
from actsparse.store import codec
from actsparse.store.codec import decode, encode, pretty
from actsparse.store.fingerprint import asked, differences, fingerprint

FINITE = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(max_size=8)
LONG = st.integers(-(2**63), 2**63 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | LONG | TEXT, lambda inner: st.dictionaries(TEXT, inner, max_size=3), max_leaves=4
)
RECORDS = [record for record in vars(results).values() if isinstance(record, type) and dataclasses.is_dataclass(record)]
for kind, strategy in ((float, FINITE), (str, TEXT), (int, LONG), (object, JSON)):
    st.register_type_strategy(kind, strategy)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_every_record_survives_json(record):
    @settings(deadline=None, derandomize=True, max_examples=8)
    @given(value=st.builds(record, **{f.name: st.from_type(t) for f, t in typed(record)}))
    def survives(value):
        assert decode(encode(value), record, "here") == value
        assert decode(pretty(value).encode(), record, "here") == value
        assert encode(decode(pretty(value).encode(), record, "here")) == encode(value)

    survives()


def typed(record: type):
    import typing

    hints = typing.get_type_hints(record)
    return [(field, hints[field.name]) for field in dataclasses.fields(record)]


def test_json_is_canonical():
    one = {"b": 1, "a": {"d": 2, "c": Path("x/y")}}
    other = {"a": {"c": "x/y", "d": 2}, "b": 1}
    assert encode(one) == encode(other) == b'{"a":{"c":"x/y","d":2},"b":1}'
    assert encode("é\u2028") == '"é\u2028"'.encode()


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_cannot_hold_is_not_written_as_another(threshold):
    """A threshold of infinity keeps no neuron; None would mean that there is no threshold."""
    with pytest.raises(ValueError, match="JSON cannot hold"):
        encode(LayerPlan(layer=0, width=4, threshold=threshold))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b'{"layer": "x", "width": 1}', "layer"),
        (b'{"width": 1}', "layer"),
        (b'{"layer": 1.5, "width": 1}', "layer"),
        (b'{"layer": true, "width": 1}', "layer"),
        (b'{"layer": 1, "width": 1, "kept": []}', "kept"),
    ],
)
def test_the_field_that_does_not_fit_is_named(data, named):
    with pytest.raises(RunError) as refused:
        decode(data, LayerPlan, "plan.json")
    assert "plan.json" in refused.value.what
    assert named in refused.value.what
    assert "--force" in refused.value.hint


@pytest.mark.parametrize("data", [b"", b"{", b"nul", b'{"layer": 1', b"\x00", b'"\xff"', b"[" * 10**6])
def test_what_is_no_json_is_refused(data):
    with pytest.raises(RunError, match="here"):
        decode(data, Manifest, "here")


def test_more_json_than_any_run_writes_is_refused_unread(monkeypatch):
    monkeypatch.setattr(codec, "MAX_JSON_BYTES", 10)
    with pytest.raises(RunError, match="more than any run writes"):
        decode(b'"' + b"x" * 20 + b'"', str, "here")


def test_what_has_no_json_form_is_refused():
    with pytest.raises(TypeError, match="no JSON form"):
        encode({"x": object()})


def test_param_sorts_its_keys_and_shortens_its_numbers():
    assert param(target=0.2) == "target=0.2"
    assert param(rung="natural", r=0.50, pop="own") == "pop=own,r=0.5,rung=natural"
    assert param(lambda_=1, s=1e-7) == "lambda=1,s=1e-07"
    assert param() == ""
    assert json.loads(encode(Measure(metric="m", param=param(a=1), value=None, unit="", n=0)))["param"] == "a=1"


# Fingerprints

PROFILE = ProfileSpec(model=ModelSpec(name="m"), data=DataSpec(limit=4))
RUNTIME_CHANGES = {
    "batch_size": 9,
    "output": Path("elsewhere"),
    "root": Path("other"),
    "force": True,
    "resume": False,
    "model": ModelSpec(name="m", device="cuda:1", offline=True),
}
CHANGES = {
    "layers": (0, 1),
    "cett_targets": (0.5,),
    "reservoir_tokens": 7,
    "reservoir_mb": 8,
    "data": DataSpec(limit=5),
    "model": ModelSpec(name="m", dtype="bfloat16"),
}


def print_of(spec, kind: RunKind = RunKind.PROFILE) -> str:
    return fingerprint(kind, {"asked": asked(spec)})


@pytest.mark.parametrize("name", RUNTIME_CHANGES)
def test_how_a_profile_is_carried_out_stays_out_of_its_fingerprint(name):
    assert print_of(dataclasses.replace(PROFILE, **{name: RUNTIME_CHANGES[name]})) == print_of(PROFILE)


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_profile_finds_is_in_its_fingerprint(name):
    assert print_of(dataclasses.replace(PROFILE, **{name: CHANGES[name]})) != print_of(PROFILE)


@pytest.mark.parametrize("change", [{"seed": 1}, {"part": "odd"}, {"sink_tokens": 0}, {"calib_blocks": (4, 8)}])
def test_every_field_of_the_data_counts(change):
    data = dataclasses.replace(PROFILE.data, **change)
    assert print_of(dataclasses.replace(PROFILE, data=data)) != print_of(PROFILE)


def test_an_evaluation_keeps_its_timing_and_not_its_gate():
    spec = EvalSpec(model=ModelSpec(name="m"), plans=("griffin@0.5",))
    assert print_of(dataclasses.replace(spec, timing_tokens=2)) != print_of(spec)
    assert print_of(dataclasses.replace(spec, max_ppl_increase=0.05, min_top1=0.5, force=True)) == print_of(spec)


def test_a_threshold_keeps_its_plan_and_not_its_device():
    spec = ThresholdSpec(run=Path("r"), plan="griffin@0.5")
    assert print_of(dataclasses.replace(spec, plan="griffin@0.4")) != print_of(spec)
    assert print_of(dataclasses.replace(spec, device="cuda", offline=True)) == print_of(spec)


def test_kind_and_schema_version_are_in_the_fingerprint(monkeypatch):
    before = print_of(PROFILE)
    assert print_of(PROFILE, RunKind.EVAL) != before
    monkeypatch.setattr("actsparse.store.fingerprint.SCHEMA_VERSION", 99)
    assert print_of(PROFILE) != before


def test_differences_name_the_leaves_that_differ_and_no_others():
    old = {"asked": {"limit": 4, "plan": "a", "gone": 1}, "text": "t"}
    new = {"asked": {"limit": 5, "plan": "a", "more": None}, "text": "t"}
    assert differences(old, new) == [
        "gone: 1 -> (absent)",
        "limit: 4 -> 5",
        "more: (absent) -> None",
    ]
    assert differences({"texts": ["ab" * 32]}, {"texts": ["cd" * 32]}) == ["texts: ['abababab...'] -> ['cdcdcdcd...']"]
    assert differences(old, old) == []
