"""The benchmarks for a GPU, on machines without one: that they measure what they say, refuse what is wrong,
and go on when something fails, dies, hangs or takes too long.

Where a GPU would have to answer, something written here does; no number in this file is a measurement.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

TREE = Path(__file__).resolve().parent.parent
sys.path.append(str(TREE))  # behind everything else, as in test_benchmarks.py

from benchmarks import (  # noqa: E402
    gpu_check,
    gpu_contenders,
    gpu_results,
    gpu_run,
    gpu_shapes,
    gpu_time,
)
from benchmarks.gpu_results import GpuRow  # noqa: E402
from benchmarks.shapes import Linear, Pruned  # noqa: E402
from sparseops import _native  # noqa: E402
from sparseops.ops import REGISTRY, dispatch  # noqa: E402
from sparseops.testing import Expected  # noqa: E402

TINY = gpu_shapes.tiny_works("nm24_linear")[0]
CPU = torch.device("cpu")


# ---- what is measured


def test_layers_are_those_of_real_models() -> None:
    works = gpu_shapes.linear_works()
    names = [work.name for work in works if work.tag == "bf16"]
    assert {f"{n}x{n}->{n}" for n in (1024, 2048, 4096, 8192, 16384)} <= set(names)
    for layer in ("4096->14336", "14336->4096", "4096->6144", "3584->3584", "3584->18944", "18944->3584"):
        assert {f"{tokens}x{layer}" for tokens in (1, 4, 16, 64, 256, 1024, 4096)} <= set(names)
    convs = Counter(work.name.split("x")[1].split(" ")[1] for work in gpu_shapes.conv_works())
    assert set(convs) == {"1", "32", "64"} and len(set(convs.values())) == 1
    sources = " ".join(work.source for work in gpu_shapes.conv_works())
    assert "ResNet-50" in sources and "VGG16" in sources
    everything = [work for make in gpu_shapes.WORKS.values() for work in make()]
    assert len({(work.op, work.name, work.tag) for work in everything}) == len(everything)
    assert all(work.op in REGISTRY and work.source for work in everything)


def test_a_sweep_goes_through_some_of_the_layers() -> None:
    sweep = {(work.name, work.tag): work for work in gpu_shapes.sweep_works()}
    everything = {(work.name, work.tag) for work in gpu_shapes.linear_works()}
    assert set(sweep) < everything and {tag for _, tag in sweep} == {"bf16"}
    assert list(sweep)[:2] == [("8192x8192->8192", "bf16"), ("4096x4096->4096", "bf16")]
    for tokens in (64, 256, 1024, 4096):
        assert {(f"{tokens}x3584->18944", "bf16"), (f"{tokens}x4096->14336", "bf16")} <= set(sweep)


def test_the_best_comes_first() -> None:
    first = gpu_shapes.linear_works()[:16]
    assert {work.tag for work in first} == {"bf16"}
    assert {work.layer.tokens for work in first} >= {1, 8192}


def test_strided_convolution() -> None:
    conv = gpu_shapes.StridedConv(2, 16, 7, 8, 3, 2)
    y = torch.nn.functional.conv2d(torch.ones(2, 16, 7, 7), torch.ones(8, 16, 3, 3), stride=2, padding=1)
    assert y.shape[-1] == conv.out_side == 4 and conv.name == "3x3 2x16@7->8 /2"
    assert conv.flops == 2 * y.numel() * 16 * 9


# ---- timing


class FakeClock:
    """Answers with the time that each call has on a list, and remembers the order."""

    device = CPU

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds, self.order, self.delays = milliseconds, [], []

    def wait(self) -> None:
        pass

    def sample(self, call: Callable[[], str], delay_ms: float) -> Callable[[], float]:
        name = call()
        self.order.append(name)
        self.delays.append(delay_ms)
        return lambda: self.milliseconds[name]

    def calls(self) -> dict[str, Callable[[], str]]:
        return {name: lambda name=name: name for name in self.milliseconds}


def test_contenders_take_turns() -> None:
    clock = FakeClock(a=1.0, b=3.0)
    found = gpu_time.measure(clock.calls(), clock)
    assert (found["a"].ms, found["b"].ms) == (1.0, 3.0) and found["a"].rounds == gpu_time.MOST
    assert "".join(clock.order[2:10]) == "abbaabba"


def test_long_calls_are_sampled_less_often_but_often_enough() -> None:
    rounds = {ms: gpu_time.measure((c := FakeClock(a=ms)).calls(), c)["a"].rounds for ms in (0.01, 20, 5e3)}
    assert rounds == {0.01: gpu_time.MOST, 20: 20, 5e3: gpu_time.FEWEST}


def test_the_gpu_waits_until_the_slowest_to_start_is_in_its_queue() -> None:
    clock = FakeClock(a=1.0, b=1.0)
    calls = clock.calls() | {"b": lambda: (time.sleep(0.004), "b")[1]}
    gpu_time.measure(calls, clock)
    assert set(clock.delays[2:]) == {gpu_time.LONGEST_DELAY_MS}
    clock = FakeClock(a=1.0)
    gpu_time.measure(clock.calls(), clock)
    assert clock.delays[-1] < 1.0


def test_a_sample_on_a_gpu_begins_with_a_cold_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"sleep {cycles}"))
    clock = gpu_time.CudaClock.__new__(gpu_time.CudaClock)
    clock._flush = SimpleNamespace(fill_=lambda _: log.append("flush"))
    elapsed = clock.sample(lambda: log.append("call"), 0.5)
    assert log == ["flush", "sleep 1000000", "event", "call", "event"] and elapsed() == 2.5


# ---- whether a result is right


def test_judging_switches_everything_back() -> None:
    def state() -> tuple[bool, ...]:
        matmul = torch.backends.cuda.matmul
        return (
            matmul.allow_fp16_reduced_precision_reduction,
            matmul.allow_bf16_reduced_precision_reduction,
            torch.backends.cudnn.benchmark,
            torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = True
    before = state()
    with gpu_check.judging(poison=False):
        assert state() == (False, False, False, False, False)
    with gpu_check.judging(poison=True):
        assert state() == (False, False, False, True, True)
        assert torch.empty(3).isnan().all()
    assert state() == before
    torch.backends.cudnn.benchmark = False


@pytest.mark.parametrize("op", gpu_shapes.WORKS)
def test_every_part_of_a_result_is_checked(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "ELEMENTS_AT_ONCE", 700)
    most_parts = 0
    for work in gpu_shapes.tiny_works(op):
        data = gpu_contenders.inputs(work, CPU)
        share = work.layer.kept_macs if isinstance(work.layer, Pruned) else 0.5
        assert (data.dense != 0).all() and (data.pruned() != 0).double().mean() == share
        parts = gpu_check.expected_parts(work, data)
        y = torch.cat([expected.exact for _, expected in parts]).to(parts[0][1].plain.dtype)
        assert y.numel() == gpu_check.outputs(work, data)
        assert gpu_check.fault(y, parts, strict=True) is None
        for place in (0, -1):
            broken = y.clone()
            broken[(place,) * y.ndim] += 1 + y.abs().max()
            assert "1 of" in gpu_check.fault(broken, parts, strict=True)
        assert "off by" in gpu_check.fault(-y, parts, strict=False)
        assert "off by" in gpu_check.fault(y * math.nan, parts, strict=False)
        assert "rows" in gpu_check.fault(y[1:], parts, strict=False)
        most_parts = max(most_parts, len(parts))
    assert most_parts > 1


def test_a_bad_yardstick_is_not_used() -> None:
    exact = torch.randn(50, dtype=torch.float64)
    expected = Expected(exact, (exact + 1).half(), exact.abs(), exact.abs())
    assert gpu_check.off(exact.half(), expected) is None
    assert "50 of 50" in gpu_check.off((exact + 1).half(), expected)


# ---- contenders


def test_the_baseline_has_no_zeros_and_the_peers_have_the_pruned_weight() -> None:
    work = gpu_shapes.GpuWork(Linear(4, 64, 32), "square", torch.bfloat16)
    data = gpu_contenders.inputs(work, CPU)
    dense, pruned, *sparse = gpu_contenders.peers(work, data)
    x = data.x
    assert torch.equal(dense.make()(), x @ data.dense.t()) and not dense.pruned
    assert torch.equal(pruned.make()(), x @ data.pruned().t()) and pruned.pruned
    assert [c.name for c in sparse] == ["cusparselt", "cusparselt, searched", "torch cutlass"]
    assert all(c.pruned and c.weight_bytes == 1.125 for c in sparse)


TILES = {
    name: dispatch.Tile(i, name, features, tokens, depth, consumers, arch)
    for i, (name, features, tokens, depth, consumers, arch) in enumerate(
        [
            ("few8", 32, 8, 128, 1, 80),
            ("few16", 32, 16, 128, 1, 80),
            ("small", 64, 64, 64, 1, 80),
            ("large", 128, 128, 64, 1, 80),
            ("sm90_128x8", 128, 8, 128, 2, 90),
            ("sm90_128x32", 128, 32, 128, 2, 90),
            ("sm90_128x64", 128, 64, 128, 2, 90),
            ("sm90_128x256", 128, 256, 128, 2, 90),
            ("sm90_rs_128x256", 128, 256, 128, 2, 90),
        ]
    )
}
MMA_TILES = tuple(name for name in TILES if "sm90" not in name)


@pytest.fixture
def planned_op(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A call that is cut by the rule, and the plans it was cut by."""
    monkeypatch.setattr(dispatch, "built_tiles", lambda: TILES)
    taken: list[str] = []

    def call(tokens: int, rows: int, cols: int, allowed: tuple[str, ...]) -> Callable[[], None]:
        def run() -> None:
            product = dispatch.Product(tokens, rows, cols)
            taken.append(gpu_contenders.text(dispatch.plan("nm24_linear", product, 132, allowed)))

        return run

    return lambda *arguments: (call(*arguments), taken)


def test_other_plans_are_tried(planned_op: Callable) -> None:
    call, taken = planned_op(8, 4096, 4096, MMA_TILES)
    found = gpu_contenders.ours(call, 1.125, on_gpu=True)
    assert found[0].picked and found[0].plan == taken[0] and not any(c.picked for c in found[1:])
    tiles = {c.plan.split("/")[0] for c in found}
    assert tiles == set(MMA_TILES) and len({c.plan for c in found}) == len(found)
    splits = {c.plan for c in found if c.plan.startswith("few8/")}
    assert "few8/1" in splits and len(splits) > 1
    for contender in found:
        taken.clear()
        contender.make()()
        assert taken == [contender.plan]
    assert _native.impl == "auto" and dispatch.plan.__module__ == "sparseops.ops.dispatch"


def test_tiles_for_few_tokens_are_not_tried_for_many(planned_op: Callable) -> None:
    call, _ = planned_op(1024, 256, 512, MMA_TILES)
    assert {plan.tile.name for plan in gpu_contenders.plans(call)} == {"small", "large"}
    call, _ = planned_op(1024, 256, 512, tuple(TILES))
    assert {plan.tile.name for plan in gpu_contenders.plans(call)} == set(TILES) - {
        "few8",
        "few16",
        "sm90_128x8",
        "sm90_128x32",
    }
    call, _ = planned_op(4, 256, 512, dispatch.WIDE_TILES)
    assert {plan.tile.name for plan in gpu_contenders.plans(call)} == {"small", "large"}


def test_wide_tiles_of_sm90_are_not_tried_for_few_tokens(planned_op: Callable) -> None:
    call, _ = planned_op(1, 4096, 4096, tuple(TILES))
    names = {plan.tile.name for plan in gpu_contenders.plans(call)}
    assert names == {*MMA_TILES, "sm90_128x8"}


def test_a_sweep_tries_all_tiles_with_splits_and_clusters(planned_op: Callable) -> None:
    call, taken = planned_op(256, 4096, 4000, tuple(TILES))
    some = [gpu_contenders.text(plan) for plan in gpu_contenders.plans(call)]
    found = [gpu_contenders.text(plan) for plan in gpu_contenders.plans(call, wide=True)]
    assert found[0] == some[0] == taken[0] and set(some) < set(found) and len(set(found)) == len(found)
    for tile in ("sm90_128x64", "sm90_128x256", "sm90_rs_128x256"):
        assert {f"{tile}/1", f"{tile}/1/2"} <= set(found)
        assert any(text.startswith(tile) and text.split("/")[1] != "1" for text in found)
    assert not any(text.startswith(("small", "large")) and text.count("/") > 1 for text in found)
    for contender in gpu_contenders.ours(call, 1.125, on_gpu=True, wide=True):
        taken.clear()
        contender.make()()
        assert taken == [contender.plan]


def test_splits_leave_none_without_columns_and_do_not_flood_the_gpu() -> None:
    tile = TILES["sm90_128x256"]

    def splits(tiles: int, cols: int, splits: int, bits: int = 16) -> list[tuple[int, int]]:
        product = dispatch.Product(256, 128 * tiles, cols, element_bits=bits)
        plan = dispatch.Plan(tile, splits, tiles, 2)
        return [(p.splits, p.cluster) for p in gpu_contenders.variants(plan, product, most_blocks=528)]

    assert splits(40, 1280, 4) == [(s, c) for s in (4, 1, 2, 5) for c in (2, 1)]  # 10 stages: 8 would be 5
    assert splits(100, 12800, 3) == [(s, c) for s in (3, 1) for c in (2, 1)]  # 600 blocks are too many
    assert splits(10, 1280, 2, bits=8) == [
        (s, c) for s in (2, 1, 3) for c in (2, 1)
    ]  # 5 stages: 4 would be 3
    few = dispatch.Plan(TILES["sm90_128x8"], 1, 4)
    assert {p.cluster for p in gpu_contenders.variants(few, dispatch.Product(8, 512, 512), 528)} == {1}


def test_a_call_on_a_gpu_that_runs_no_kernel_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ran no kernel of ours"):
        gpu_contenders.ours(lambda: torch.empty(0), 1.125, on_gpu=True)
    assert [c.plan for c in gpu_contenders.ours(lambda: torch.empty(0), 1.125, on_gpu=False)] == [""]


@pytest.mark.parametrize("op", ["channel_conv", "channel_linear"])
def test_channel_peers_are_the_dense_layer_and_what_is_left_of_it(op: str) -> None:
    for work in gpu_shapes.tiny_works(op):
        data = gpu_contenders.inputs(work, CPU)
        dense, compact = gpu_contenders.peers(work, data)
        assert (dense.name, compact.name) == (
            gpu_results.BASELINES[op],
            gpu_results.BASELINES[op] + ", compact",
        )
        assert not dense.pruned and not compact.pruned
        kept = data.args[3]
        y = gpu_contenders.plain(work, data)()
        torch.testing.assert_close(compact.make()(), y.index_select(1, kept), rtol=2e-2, atol=2e-2)
        assert dense.make()().shape == y.shape and not torch.allclose(dense.make()(), y)
        assert compact.weight_bytes == 2 * work.layer.kept_macs
        (ours,) = gpu_contenders.channels_alone(work, data, on_gpu=True)
        assert ours.ours and ours.picked and ours.plan == "triton" and torch.equal(ours.make()(), y)


def test_channel_works_halve_inputs_outputs_and_both() -> None:
    for op in ("channel_conv", "channel_linear"):
        works = gpu_shapes.WORKS[op]()
        assert [work.layer.kept_macs for work in works[:3]] == [0.5, 0.5, 0.25]
        assert works[0].op == op and works[0].layer.kept_inputs == works[0].layer.inputs
        assert all(w.layer.kept_inputs % 8 == w.layer.kept_outputs % 8 == 0 for w in works)


def test_8_bit_peers_take_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight, raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda weight, x, **_: (weight, x), raising=False)
    work = gpu_shapes.GpuWork(Linear(32, 64, 32), "square", torch.float8_e4m3fn)
    data = gpu_contenders.inputs(work, CPU)
    dense, sparse = gpu_contenders.peers(work, data)
    expected = data.x.float() @ data.dense.float().t()
    assert torch.allclose(dense.make()().float(), expected, rtol=0.01) and not dense.pruned
    weight, x = sparse.make()()
    assert weight.dtype == work.dtype and torch.equal(weight.float(), data.pruned().float())
    assert torch.equal(x.float(), data.x.t().float())


# ---- rows


@pytest.fixture
def bench(tmp_path: Path) -> gpu_run.Bench:
    return gpu_run.Bench(gpu_time.CpuClock(), gpu_run.Journal(tmp_path / "now"), dry_run=True)


@pytest.fixture
def broken_op(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Puts something in the place of nm24_linear's function."""

    def put(function: Callable) -> None:
        monkeypatch.setitem(REGISTRY, "nm24_linear", replace(REGISTRY["nm24_linear"], fn=function))

    return put


def run(bench: gpu_run.Bench, work: gpu_shapes.GpuWork = TINY) -> dict[str, GpuRow]:
    with torch.no_grad():
        return {row.contender: row for row in bench.run(work)}


@pytest.mark.parametrize("op", ["nm24_linear", "nm24_conv", "channel_linear", "channel_conv"])
def test_rows_hold_times_ratios_and_failures(bench: gpu_run.Bench, op: str) -> None:
    rows = run(bench, gpu_shapes.tiny_works(op)[0])
    ours, dense = rows["sparseops"], rows[gpu_results.BASELINES[op]]
    assert ours.status == dense.status == "ok" and ours.picked and ours.p20 <= ours.ms <= ours.p80
    assert ours.ratio == pytest.approx(dense.ms / ours.ms, rel=0.01) and dense.ratio == 1
    assert ours.tflops == pytest.approx(gpu_shapes.tiny_works(op)[0].layer.flops / ours.ms / 1e9, abs=0.01)
    assert "stand-in for a GPU" in ours.machine and ours.commit and ours.torch == torch.__version__
    if op == "nm24_linear":
        assert rows["cusparselt"].status.startswith("failed: ") and rows["cusparselt"].ms is None


def test_a_wrong_result_is_recorded_and_has_no_time(bench: gpu_run.Bench, broken_op: Callable) -> None:
    right = REGISTRY["nm24_linear"].fn

    def wrong(*args: object, **kwargs: object) -> torch.Tensor:
        y = right(*args, **kwargs).clone()
        y[-1, -1] += 1
        return y

    broken_op(wrong)
    rows = run(bench)
    assert rows["sparseops"].status.startswith("wrong: ") and "1 of" in rows["sparseops"].status
    assert rows["sparseops"].ms is None and rows["sparseops"].ratio is None
    assert rows["cublas"].status == "ok"


def test_what_nobody_wrote_is_wrong(bench: gpu_run.Bench, broken_op: Callable) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    broken_op(lambda x, values, meta, **_: x.new_empty(len(x), len(values)))
    assert run(bench)["sparseops"].status.startswith("wrong: ")


def test_a_failure_of_ours_is_recorded(bench: gpu_run.Bench, broken_op: Callable) -> None:
    def fail(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("nm24_linear:\n no")

    broken_op(fail)
    assert run(bench)["sparseops"].status == "failed: RuntimeError: nm24_linear: no"


def test_data_that_do_not_fit_are_a_row(bench: gpu_run.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(gpu_run, "inputs", fail)
    assert run(bench)["sparseops"].status == "failed: OutOfMemoryError: out of memory"


def test_a_layer_without_a_kernel_is_not_run(bench: gpu_run.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    op = replace(REGISTRY["nm24_linear"], supports=lambda *_: "there is no kernel")
    monkeypatch.setitem(REGISTRY, "nm24_linear", op)
    rows = run(bench)
    assert rows["sparseops"].status == "not run: there is no kernel" and rows["cublas"].status == "ok"


def test_a_gpu_that_is_lost_ends_the_process_and_says_who_did_it(
    bench: gpu_run.Bench, broken_op: Callable, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> torch.Tensor:
        bench.clock.wait = lost
        raise RuntimeError("an illegal memory access")

    def lost() -> None:
        raise RuntimeError("the context is lost")

    broken_op(fail)
    with pytest.raises(gpu_run.Lost):
        run(bench)
    crash = json.loads((tmp_path / "now").read_text())
    assert (crash["contender"], crash["work"]) == ("sparseops", TINY.name)
    assert "illegal memory access" in crash["how"]


def test_a_child_without_its_gpu_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> list[GpuRow]:
        raise gpu_run.Lost from RuntimeError("an illegal memory access")

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(gpu_run.Bench, "run", fail)
    monkeypatch.setattr(gpu_run.os, "_exit", leave)
    with pytest.raises(SystemExit) as stopped:
        gpu_run.child(
            "nm24_linear", tmp_path, time.time() + 60, True, False, gpu_run.Journal(tmp_path / "now")
        )
    assert stopped.value.code == gpu_run.LOST
