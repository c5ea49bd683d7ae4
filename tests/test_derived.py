"""What is made from a weight once: made again when the weight changes, and never for a CUDA graph alone."""

import gc
from types import SimpleNamespace

import pytest
import torch

from sparseops.formats import NM24
from sparseops.formats.nm24_slabs import pack_slabs
from sparseops.ops import cuda, derived, registry
from sparseops.ops.derived import derive, forget


class Counter:
    """``derive`` of a function that counts its calls."""

    def __init__(self, source, make=lambda t: t * 2):
        self.source, self.make, self.calls = source, make, 0

    def __call__(self, key="key"):
        def made():
            self.calls += 1
            return self.make(self.source)

        return derive(self.source, key, made)


def test_made_once_for_each_key():
    counter = Counter(torch.arange(4))
    first = counter()
    assert counter() is first and counter.calls == 1
    assert counter("other") is not first and counter.calls == 2
    assert counter() is first and counter("other") is not first and counter.calls == 2


def test_made_again_in_place_after_a_change():
    counter = Counter(torch.arange(4))
    first = counter()
    counter.source[0] = 7
    assert counter() is first and first.tolist() == [14, 2, 4, 6]
    assert counter.calls == 2


def test_made_again_after_other_memory():
    counter = Counter(torch.arange(4))
    counter()
    counter.source.data = torch.arange(4) + 1
    assert counter().tolist() == [2, 4, 6, 8]
    counter.source.data = torch.arange(2)
    assert counter().tolist() == [0, 2]


def test_a_write_through_data_is_not_seen_until_forgotten():
    counter = Counter(torch.arange(4))
    first = counter()
    counter.source.data[0] = 5
    forget(counter.source, "another key")
    assert counter() is first and first[0] == 0
    forget(counter.source, "key")
    assert counter() is first and first[0] == 10
    forget(torch.arange(4), "key")


def test_gone_with_its_source():
    before = len(derived._entries)
    counter = Counter(torch.arange(4))
    counter()
    assert len(derived._entries) == before + 1
    counter.source = None
    gc.collect()
    assert len(derived._entries) == before


def test_inference_tensors_have_no_version():
    with torch.inference_mode():
        counter = Counter(torch.arange(4))
        counter()
        counter.source[0] = 5
        assert counter()[0] == 10
    assert counter.calls == 2


def test_what_inference_mode_makes_can_be_made_again_outside():
    counter = Counter(torch.arange(4))
    with torch.inference_mode():
        first = counter()
    assert not first.is_inference()
    counter.source[0] = 5
    assert counter() is first and first[0] == 10


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU, and notes the streams that its memory is kept for."""

    is_cuda = True

    def record_stream(self, stream):
        self.__dict__.setdefault("kept_for", set()).add(stream.name)


class Stream:
    def __init__(self, name):
        self.name, self.waited, self.done = name, [], False

    def record_event(self):
        return SimpleNamespace(stream=self, query=lambda: self.done)

    def wait_event(self, event):
        self.waited.append(event.stream.name)


@pytest.fixture
def gpu(monkeypatch):
    """Streams and captures of our choosing."""
    state = SimpleNamespace(stream=Stream("a"), capturing=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(derived, "_is_capturing", lambda device: state.capturing)
    return state


def on_gpu():
    return Counter(torch.arange(4).as_subclass(OnGPU))


def test_another_stream_waits_and_keeps_the_memory(gpu):
    counter = on_gpu()
    first, a = counter(), gpu.stream
    assert counter() is first and a.waited == []
    gpu.stream = Stream("b")
    assert counter() is first and gpu.stream.waited == ["a"]
    a.done = True
    gpu.stream = Stream("c")
    assert counter() is first and gpu.stream.waited == []
    assert first.kept_for == {"a", "b", "c"}
    counter.source[0] = 5  # made again on c
    assert counter() is first
    gpu.stream = a
    counter()
    assert a.waited == ["c"] and counter.calls == 2


def test_a_capture_uses_what_is_there_and_keeps_nothing(gpu):
    counter = on_gpu()
    gpu.capturing = True
    cold = counter()
    assert counter() is not cold and counter.calls == 2
    gpu.capturing = False
    warm = counter()
    assert counter.calls == 3
    gpu.capturing, gpu.stream = True, Stream("capture")
    assert counter() is warm and gpu.stream.waited == [] and counter.calls == 3
    counter.source[0] = 5
    assert counter() is not warm and warm[0] == 0
    gpu.capturing = False
    assert counter() is warm and warm[0] == 10


def test_a_weight_is_packed_once():
    weight = NM24.from_dense(torch.randn(40, 100).half(), prune="magnitude")
    first, again = (cuda.weight(weight.values, weight.meta) for _ in range(2))
    assert first.slabs is again.slabs and torch.equal(first.slabs, pack_slabs(weight.meta))
    assert first.values is weight.values and first.slab_rows == 128
    grouped = cuda.weight(weight.values, weight.meta, groups=20)
    assert grouped.slab_rows == 384 and torch.equal(grouped.slabs, pack_slabs(weight.meta, 20))
    narrow = cuda.weight(weight.values.to(torch.int8), weight.meta)
    assert torch.equal(narrow.slabs, pack_slabs(weight.meta, element_bits=8))
    assert cuda.weight(weight.values, weight.meta).slabs is first.slabs


def test_f32_values_are_rounded_once(monkeypatch):
    monkeypatch.setattr(registry, "on_gpu", lambda x: True)
    weight = NM24.from_dense(torch.randn(40, 100), prune="magnitude")
    values = torch.nn.Parameter(weight.values)
    first = cuda.weight(values, weight.meta).values
    assert first.dtype is torch.bfloat16 and not first.requires_grad
    assert cuda.weight(values, weight.meta).values is first
    with torch.no_grad():
        values *= 2
    assert torch.equal(cuda.weight(values, weight.meta).values, values.bfloat16())
    values.data += 1
    cuda.forget_values(values)
    assert torch.equal(cuda.weight(values, weight.meta).values, values.bfloat16())


def test_values_elsewhere_are_copied():
    weight = NM24.from_dense(torch.randn(4, 100).half(), prune="magnitude")
    moved = torch.cat([weight.values.new_zeros(1), weight.values.flatten()])[1:].view_as(weight.values)
    assert moved.data_ptr() % 16
    for values in (moved, weight.values.t().contiguous().t()):
        stored = cuda.weight(values, weight.meta).values
        assert stored.data_ptr() % 16 == 0 and stored.is_contiguous() and torch.equal(stored, weight.values)
