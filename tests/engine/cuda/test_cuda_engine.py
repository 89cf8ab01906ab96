"""What the CUDA engine says of the steps that it chooses, and of memory; no device is needed for either."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from gate_plans import make_gate_plan
from plain_operators import PlainBatchOperators, PlainOperators
from tiny import make_model

from actsparse.engine.cuda import engine as cuda_engine
from actsparse.engine.cuda import graph, native
from actsparse.engine.cuda.batch_products import fewest_slices
from actsparse.engine.cuda.engine import CudaEngine
from actsparse.engine.cuda.graph import capture
from actsparse.engine.step.decoder import Decoder
from actsparse.engine.step.packing import weights_from_model
from actsparse.engine.step.plans import DensePlan
from actsparse.engine.step.sampling import Sampling
from actsparse.engine.step.torch_step import TorchStep
from actsparse.errors import is_out_of_memory


@pytest.fixture
def weights(monkeypatch):
    monkeypatch.setattr(cuda_engine, "native_refusal", lambda weights: None)
    monkeypatch.setattr(cuda_engine, "Operators", lambda device, tuning: PlainOperators())
    monkeypatch.setattr(cuda_engine, "BatchOperators", lambda device, batch, tuning: PlainBatchOperators(batch))
    return weights_from_model(make_model("llama").double())


def uncompiled(monkeypatch, failure=None):
    def made(*args, compiled=False, **how):
        if compiled and failure is not None:
            return None
        return TorchStep(*args, **how)

    def captured(step):
        if step is None:
            raise failure
        return capture(step)

    monkeypatch.setattr(cuda_engine, "capture", captured)
    monkeypatch.setattr(cuda_engine, "TorchStep", made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a graph holds nothing of steps on a CPU
    monkeypatch.setattr(cuda_engine, "has_triton", lambda: False)


def decoded(decoder, plan):
    decoder.start(torch.arange(3, 3 + decoder.state.batch), 0)
    decoder.set_plan(plan)
    return decoder.decode(5), decoder.state.logits.clone()


@pytest.mark.parametrize(("kind", "turns"), [("teal", False), ("cats", False), ("tops", True), ("channels", True)])
def test_a_batch_reads_its_union_or_takes_turns(weights, monkeypatch, kind, turns):
    uncompiled(monkeypatch)
    decoder = Decoder(weights, max_length=20, batch=2, engine=CudaEngine(weights, batch=2))
    plan = make_gate_plan(kind, weights)
    found = decoded(decoder, plan)
    said = ["2 sequences decode in turns under this plan, each reading what it keeps"] if turns else []
    assert decoder.warnings == said
    reference = Decoder(weights, max_length=20, batch=2, engine=CudaEngine(weights, batch=2, native=False))
    torch.testing.assert_close(found, decoded(reference, plan))
    decoded(decoder, DensePlan())
    assert decoder.warnings == said


def test_more_sequences_than_the_kernels_take_run_through_torch(weights, monkeypatch):
    uncompiled(monkeypatch)
    decoder = Decoder(weights, max_length=20, batch=9, engine=CudaEngine(weights, batch=9))
    for _ in range(2):
        decoder.set_plan(DensePlan())
    said = "dense decode runs through torch.compile: the compiled kernels decode up to 8 sequences at once here, not 9"
    assert decoder.warnings == [said]


def test_fast_atomics_that_torch_does_not_have_are_said(weights, monkeypatch):
    uncompiled(monkeypatch)
    decoder = Decoder(weights, max_length=20, engine=CudaEngine(weights, native=False, fast_atomics=True))
    decoder.set_plan(DensePlan())
    assert cuda_engine.ONE_ORDER not in decoder.warnings
    decoder.set_plan(make_gate_plan("teal", weights))
    assert cuda_engine.ONE_ORDER in decoder.warnings


@pytest.mark.parametrize("room", [2, 4, 8])
@pytest.mark.parametrize("inputs", [33, 4096, 5120, 8192, 40960])
@pytest.mark.parametrize("most", [113 * 1024, 226 * 1024])
def test_a_warps_list_of_rows_fits_a_block(room, inputs, most):
    warps, ring = (8, 8704) if room == 8 else (16, 4096)

    def bytes_of(slices):
        return warps * (ring + (inputs // (slices * warps) + 8) * (room + 1) * 4)

    slices = fewest_slices(inputs, room, most)
    assert bytes_of(slices) <= most
    assert slices == 1 or bytes_of(slices - 1) > 0.95 * most


def test_padding_is_left_out_by_the_kernels_too(weights, monkeypatch):
    uncompiled(monkeypatch)
    engine = CudaEngine(weights)
    decoder = Decoder(weights, max_length=20, engine=engine)
    decoder.state.padding.fill_(3)
    decoder.start(5, 3)
    engine.runner(weights, decoder.state, DensePlan(), sampled=False, padded=True).run(4)
    padded = decoder.state.logits.clone()
    decoder.start(5, 0)
    engine.runner(weights, decoder.state, DensePlan(), sampled=False, padded=False).run(1)
    torch.testing.assert_close(padded, decoder.state.logits)
    assert decoder.warnings == []


def test_memory_that_compiling_a_step_lacked_is_no_failure_to_compile(weights, monkeypatch):
    uncompiled(monkeypatch, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        Decoder(weights, max_length=20, batch=9, engine=CudaEngine(weights, batch=9)).set_plan(DensePlan())
    uncompiled(monkeypatch, RuntimeError("no triton"))
    decoder = Decoder(weights, max_length=20, batch=9, engine=CudaEngine(weights, batch=9))
    decoder.set_plan(DensePlan())
    assert "decode runs uncompiled: RuntimeError: no triton" in decoder.warnings


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_the_words_of_libraries_without_memory_are_recognised(said):
    assert is_out_of_memory(RuntimeError(said))


def test_a_kernel_without_memory_is_out_of_memory_and_no_fault_of_the_kernels():
    class Handle:
        class actsparse_error:
            def __new__(cls, code):
                return {2: b"out of memory", 9: b"invalid configuration argument"}[code]

    library = native.Library(Handle())
    with pytest.raises(torch.OutOfMemoryError, match="kernel rows: out of memory") as error:
        library._check(2, "rows")
    assert is_out_of_memory(error.value)
    with pytest.raises(native.NativeError, match="invalid configuration"):
        library._check(9, "rows")


@pytest.mark.parametrize(
    ("kind", "said"),
    [("teal", cuda_engine.ANY_ORDER), ("cats", cuda_engine.ONE_ORDER), ("routed", cuda_engine.ONE_ORDER)],
)
def test_fast_atomics_are_used_where_there_are_some_and_said(weights, monkeypatch, kind, said):
    uncompiled(monkeypatch)
    decoder = Decoder(weights, max_length=20, engine=CudaEngine(weights, fast_atomics=True))
    decoder.set_plan(DensePlan())
    assert decoder.warnings == []
    decoder.set_plan(make_gate_plan(kind, weights))
    decoder.decode(3)
    assert decoder.warnings == [said]


def test_fast_atomics_reach_the_step(weights, monkeypatch):
    seen = []
    monkeypatch.setattr(cuda_engine, "native_step", lambda *args, **_how: seen.append(args[2]) or Mock(counters=[]))
    for asked in (False, True):
        decoder = Decoder(weights, max_length=20, engine=CudaEngine(weights, fast_atomics=asked))
        decoder.set_plan(make_gate_plan("teal", weights))
    assert [plan.fast_atomics for plan in seen] == [False, True]


@pytest.mark.parametrize(("said", "raised"), [("CUDA error: out of memory", True), ("operation not permitted", False)])
def test_a_capture_without_memory_is_out_of_memory(monkeypatch, said, raised):
    def fail():
        raise RuntimeError(said)

    @contextmanager
    def captures(_graph):
        yield fails.append(0)
        if len(fails) == 1:
            fail()

    fails = []
    fake = SimpleNamespace(
        is_available=lambda: True,
        Stream=lambda: Mock(),
        stream=lambda _stream: nullcontext(),
        current_stream=Mock(),
        synchronize=Mock(),
        empty_cache=Mock(),
        CUDAGraph=Mock(),
        graph=captures,
    )
    monkeypatch.setattr(graph, "torch", SimpleNamespace(cuda=fake, zeros=lambda *_size, **_how: None))
    if raised:
        with pytest.raises(RuntimeError, match=said):
            capture(lambda: None)
        fake.empty_cache.assert_called()
    else:
        found = capture(lambda: None)
        assert found.kind == "eager"
        assert said in found.warning


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("kind", "units"), [("teal", {"q", "k", "v", "o", "gate", "up", "down"}), ("cats", {"neuron"})]
)
def test_what_a_step_reads_is_counted(weights, monkeypatch, batch, kind, units):
    uncompiled(monkeypatch)
    engine, plan = CudaEngine(weights, batch=batch), make_gate_plan(kind, weights)
    decoder = Decoder(weights, max_length=20, batch=batch, engine=engine)
    decoder.start(torch.arange(3, 3 + batch), 0)
    decoder.set_plan(plan)
    assert not any(one.read.item() for one in engine.counters[id(plan)]), "what was tried out counts nothing"
    decoder.decode(4)
    counted = engine.counters[id(plan)]
    assert {one.unit for one in counted} == units
    assert all(0 < one.read.item() <= 4 * one.total for one in counted)
    assert sum(one.read.item() for one in counted) < 4 * sum(one.total for one in counted)
    decoder.set_plan(DensePlan())
    assert sum(map(len, engine.counters.values())) == len(counted), "dense reads what it always reads"
    before = sum(one.read.item() for one in counted)
    decoder.sample(Sampling(temperature=1.0, seed=1))
    decoder.set_plan(plan)
    decoder.decode(2)
    assert sum(one.read.item() for one in engine.counters[id(plan)]) > before, "steps that draw count too"
    decoder.forget_plan(plan)
    assert id(plan) not in engine.counters


def test_a_batch_reads_no_less_than_one_of_its_sequences(weights, monkeypatch):
    uncompiled(monkeypatch)
    plan, read = make_gate_plan("teal", weights), []
    for batch in (1, 4):
        engine = CudaEngine(weights, batch=batch)
        decoder = Decoder(weights, max_length=20, batch=batch, engine=engine)
        decoder.start(torch.arange(3, 3 + batch), 0)
        decoder.set_plan(plan)
        for one in engine.counters[id(plan)]:
            one.read.zero_()
        decoder.start(torch.arange(3, 3 + batch), 0)
        decoder.decode(1)
        read.append([one.read.item() for one in engine.counters[id(plan)]])
    assert all(one <= four for one, four in zip(*read, strict=True))
    assert sum(read[0]) < sum(read[1])
