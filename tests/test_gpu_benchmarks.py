"""The benchmarks for a GPU, on machines without one: that they measure what they say, refuse what is wrong,
and go on when something fails, dies, hangs or takes too long.

Where a GPU would have to answer, something written here does; no number in this file is a measurement.
"""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
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
    gpu_machine,
    gpu_results,
    gpu_run,
    gpu_shapes,
    gpu_small_set,
    gpu_summary,
    gpu_table,
    gpu_tests,
    gpu_time,
    results,
)
from benchmarks.gpu_results import GpuRow, OpTests, Stage  # noqa: E402
from benchmarks.shapes import Linear  # noqa: E402
from sparseops import _native  # noqa: E402
from sparseops.ops import REGISTRY, dispatch  # noqa: E402
from sparseops.testing import Expected  # noqa: E402

TINY = gpu_shapes.tiny_works("nm24_linear")[0]
CPU = torch.device("cpu")


# ---- what is measured


def test_layers_are_those_of_the_issue() -> None:
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
        assert (data.dense != 0).all() and (data.pruned() != 0).double().mean() == 0.5
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
    name: dispatch.Tile(i, name, features, tokens, 64)
    for i, (name, features, tokens) in enumerate(
        [("few8", 32, 8), ("few16", 32, 16), ("small", 64, 64), ("large", 128, 128)]
    )
}


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
    call, taken = planned_op(8, 4096, 4096, dispatch.MATRIX_TILES)
    found = gpu_contenders.ours(call, 1.125, on_gpu=True)
    assert found[0].picked and found[0].plan == taken[0] and not any(c.picked for c in found[1:])
    tiles = {c.plan.split("/")[0] for c in found}
    assert tiles == set(dispatch.MATRIX_TILES) and len({c.plan for c in found}) == len(found)
    splits = {c.plan for c in found if c.plan.startswith("few8/")}
    assert "few8/1" in splits and len(splits) > 1
    for contender in found:
        taken.clear()
        contender.make()()
        assert taken == [contender.plan]
    assert _native.impl == "auto" and dispatch.plan.__module__ == "sparseops.ops.dispatch"


def test_tiles_for_few_tokens_are_not_tried_for_many(planned_op: Callable) -> None:
    call, _ = planned_op(1024, 256, 512, dispatch.MATRIX_TILES)
    assert {plan.tile.name for plan in gpu_contenders.plans(call)} == {"small", "large"}
    call, _ = planned_op(4, 256, 512, dispatch.WIDE_TILES)
    assert {plan.tile.name for plan in gpu_contenders.plans(call)} == {"small", "large"}


def test_a_call_on_a_gpu_that_runs_no_kernel_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ran no kernel of ours"):
        gpu_contenders.ours(lambda: torch.empty(0), 1.125, on_gpu=True)
    assert [c.plan for c in gpu_contenders.ours(lambda: torch.empty(0), 1.125, on_gpu=False)] == [""]


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


@pytest.mark.parametrize("op", ["nm24_linear", "nm24_conv"])
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
        gpu_run.child("nm24_linear", tmp_path, time.time() + 60, True, gpu_run.Journal(tmp_path / "now"))
    assert stopped.value.code == gpu_run.LOST


# ---- processes


def crash(contender: str, work: gpu_shapes.GpuWork = TINY, plan: str = "") -> gpu_run.Crash:
    return gpu_run.Crash(work.op, work.name, work.tag, contender, plan, "it died")


def test_who_died_is_not_tried_again(tmp_path: Path) -> None:
    other = gpu_shapes.tiny_works("nm24_linear")[1]
    once = gpu_run.Journal(tmp_path / "now", [crash("cusparselt")])
    assert once.verdict(TINY, "cusparselt") == "failed: it died"
    assert once.verdict(other, "cusparselt") is None and once.verdict(TINY, "cublas") is None
    twice = gpu_run.Journal(tmp_path / "now", [crash("cusparselt"), crash("cusparselt", other)])
    third = gpu_shapes.tiny_works("nm24_linear")[2]
    assert twice.verdict(third, "cusparselt") == "not run: it took the process with it twice"
    ours = gpu_run.Journal(tmp_path / "now", [crash("sparseops"), crash("sparseops", other, "large/1")])
    assert ours.verdict(third, "sparseops") is None
    assert ours.verdict(other, "sparseops", "large/1") and not ours.verdict(other, "sparseops", "small/1")


def test_rows_after_a_crash(tmp_path: Path) -> None:
    for culprit, victims in (("cublas", {"cublas"}), ("timing", {"cublas", "sparseops"})):
        journal = gpu_run.Journal(tmp_path / "now", [crash(culprit)])
        rows = run(gpu_run.Bench(gpu_time.CpuClock(), journal, dry_run=True))
        assert {name for name, row in rows.items() if "it died" in row.status} == victims
        assert rows["cublas"].ms is None and rows["sparseops"].ratio is None


def test_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def watched(target: Callable, argument: object, seconds: float) -> str | None:
        process = gpu_run.FORK.Process(target=target, args=(argument,))
        process.start()
        answer = gpu_run.watch(process, tmp_path / "now", time.time() + seconds)
        assert not process.is_alive()
        return answer

    assert watched(time.sleep, 0, 20) is None
    assert watched(os._exit, 7, 20) == "the process died with status 7"
    assert watched(lambda signal: os.kill(os.getpid(), signal), 9, 20) == "the process died with status -9"
    assert watched(time.sleep, 60, 0.3) == "cut"
    monkeypatch.setattr(gpu_run, "HUNG_SECONDS", 0.3)
    assert watched(time.sleep, 60, 20) == "hung for 0.3 s"


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> tuple[list, list]:
    """The journals that children are started with; a list takes what each of them does and how it ends."""
    started: list[gpu_run.Journal] = []
    deeds: list[tuple[Callable[[gpu_run.Journal], None], str | None]] = []

    class Process:
        def __init__(self, target: Callable, args: tuple) -> None:
            assert target is gpu_run.child
            started.append(args[-1])

        def start(self) -> None:
            deeds[len(started) - 1][0](started[-1])

    monkeypatch.setattr(gpu_run, "FORK", SimpleNamespace(Process=Process))
    monkeypatch.setattr(gpu_run, "watch", lambda *_: deeds[len(started) - 1][1])
    return started, deeds


def test_a_process_that_dies_is_started_again_behind_what_it_died_of(
    tmp_path: Path, children: tuple[list, list]
) -> None:
    started, deeds = children
    deeds += [
        (lambda journal: journal.at(TINY, "cusparselt"), "the process died with status -11"),
        (lambda journal: journal.at(TINY, "sparseops", "large/2", "an illegal memory access"), "status 70"),
        (lambda journal: None, None),
    ]
    crashes = gpu_run.supervise("nm24_linear", tmp_path, time.time() + 60, dry_run=True)
    assert [(c.contender, c.plan, c.how) for c in crashes] == [
        ("cusparselt", "", "the process died with status -11"),
        ("sparseops", "large/2", "an illegal memory access"),
    ]
    assert len(started) == 3 and started[0].verdict(TINY, "cusparselt") is None
    assert started[2].verdict(TINY, "cusparselt") and started[2].verdict(TINY, "sparseops", "large/2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["cut", "the process died with status 1"])
def test_a_process_that_is_cut_or_cannot_begin_is_not_started_again(
    tmp_path: Path, children: tuple[list, list], how: str
) -> None:
    started, deeds = children
    deeds.append((lambda journal: None, how))
    assert gpu_run.supervise("nm24_linear", tmp_path, time.time() + 60, dry_run=True) == []
    assert len(started) == 1


def test_works_that_have_rows_are_not_done_again_and_time_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = gpu_run.Journal(tmp_path / "now")
    works = gpu_shapes.tiny_works("nm24_linear")
    done: list[str] = []

    def fake(bench: gpu_run.Bench, work: gpu_shapes.GpuWork) -> list[GpuRow]:
        done.append(work.name + work.tag)
        monkeypatch.setattr(gpu_run, "LONGEST_WORK_SECONDS", 0)
        return [replace(a_row(), work=work.name, dtype=work.tag)]

    monkeypatch.setattr(gpu_run.Bench, "run", fake)
    gpu_results.append(tmp_path / "layers.csv", [replace(a_row(), work=works[0].name, dtype=works[0].tag)])
    gpu_run.child("nm24_linear", tmp_path, time.time() + 60, True, journal)
    assert done == [work.name + work.tag for work in works[1:]]
    (tmp_path / "layers.csv").unlink()
    monkeypatch.setattr(gpu_run, "LONGEST_WORK_SECONDS", 5)
    gpu_run.child("nm24_linear", tmp_path, time.time() + 4, True, journal)
    assert f"out of time before {works[0].name}" in capsys.readouterr().out


def test_gpu_run_says_what_came_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def supervise(op: str, folder: Path, *_: object) -> None:
        rows = [a_row(), replace(a_row(), plan="large/1", picked=0, status="wrong: all", ms=None)]
        gpu_results.append(
            folder / "layers.csv", [*rows, replace(a_row(), op="nm24_conv", status="failed: x")]
        )

    monkeypatch.setattr(gpu_run, "supervise", supervise)
    assert gpu_run.main(["nm24_linear", "--out", str(tmp_path), "--dry-run"]) == 1
    output = capsys.readouterr().out
    assert "large/1: wrong: all" in output and "1 of 4 works, 1 wrong or failed of 2 calls of ours" in output


# ---- files


def a_row(**changes: object) -> GpuRow:
    row = GpuRow(
        date="2999-01-01T00:00Z",
        commit="abc",
        machine="a GPU",
        driver="1",
        cuda="13.0",
        torch="2",
        sparseops="0",
        archs="90a",
        sm_mhz=1980,
        op="nm24_linear",
        work="16x4096->14336",
        source="a model",
        dtype="bf16",
        contender="sparseops",
        plan="small/4",
        picked=1,
        status="ok",
        rounds=31,
        ms=0.5,
        p20=0.4,
        p80=0.6,
        host_ms=0.02,
        floor_ms=0.002,
        ratio=1.5,
        tflops=100.0,
        gbs=2000.0,
    )
    return replace(row, **changes)


def test_rows_survive_the_file_and_a_line_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "a gpu" / "layers.csv"
    rows = [a_row(), a_row(status='failed: "a", b', rounds=None, ms=None, ratio=None, sm_mhz=None)]
    gpu_results.append(file, rows[:1])
    gpu_results.append(file, rows[1:])
    assert gpu_results.read(GpuRow, file) == rows
    whole = file.read_text()
    file.write_text(whole + whole.splitlines()[1][:40])
    assert gpu_results.read(GpuRow, file) == rows
    assert gpu_results.read(GpuRow, tmp_path / "none.csv") == []
    assert results.read(tmp_path) == []  # the CPU's tables pass over it


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "8.0"), ((8, 6), "8.6"), ((9, 0), "9.0a"), ((10, 0), "10.0a"), ((12, 0), "12.0")],
)
def test_a_gpu_names_its_architecture(capability: tuple[int, int], name: str) -> None:
    assert gpu_machine.arch(capability) == name


def program(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)
    return file


def test_nvidia_smi_is_asked_and_may_be_missing_or_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(tmp_path, "nvidia-smi", 'echo "$*" >&2; echo "1980, 580.1"')
    assert gpu_machine.smi("clocks.sm", "driver_version") == ["1980", "580.1"]
    program(tmp_path, "nvidia-smi", "echo 1755")
    assert gpu_machine.sm_mhz() == 1755
    program(tmp_path, "nvidia-smi", "echo '[N/A]'")
    assert gpu_machine.sm_mhz() is None
    program(tmp_path, "nvidia-smi", "echo 'No devices were found'; exit 6")
    assert gpu_machine.smi("clocks.sm") == [""]
    (tmp_path / "nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_machine.smi("clocks.sm", "driver_version") == ["", ""]


def test_commit_is_given_or_gits_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "0123456789-dirty")
    assert gpu_machine.commit() == "0123456789-dirty"
    monkeypatch.delenv("COMMIT")
    monkeypatch.setattr(gpu_machine.provenance, "commit", lambda: "")
    assert gpu_machine.commit() == "unknown"


LOG = """
tests/test_ops.py::test_cuda[nm24_linear-tail f16] PASSED                [ 10%]
tests/test_ops.py::test_cuda[nm24_linear_i8-tail] FAILED                 [ 20%]
tests/test_ops.py::test_cuda[nm24_linear_i8-tail] ERROR                  [ 20%]
tests/test_ops.py::test_cuda[nm24_conv-x] SKIPPED (no memory)            [ 30%]
tests/test_graphs.py::test_capture PASSED                                [ 40%]
tests/test_ops.py::test_cuda[nm24_conv-y]"""


def test_tests_are_counted_by_op_also_when_cut_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_tests.count(LOG) == [
        OpTests("nm24_conv", 0, 0, 1),
        OpTests("nm24_linear", 1, 0, 0),
        OpTests("nm24_linear_i8", 0, 1, 0),
        OpTests("other", 1, 0, 0),
    ]
    (tmp_path / "log").write_text(LOG)
    assert gpu_tests.main([str(tmp_path / "log"), str(tmp_path)]) == 1
    assert capsys.readouterr().out == "2 passed, 1 failed, 1 skipped\n"
    assert gpu_results.read(OpTests, tmp_path / "tests.csv") == gpu_tests.count(LOG)
    (tmp_path / "log").write_text(LOG.replace("FAILED", "PASSED").replace("ERROR", "PASSED"))
    assert gpu_tests.main([str(tmp_path / "log"), str(tmp_path)]) == 0
    (tmp_path / "log").write_text("")
    assert gpu_tests.main([str(tmp_path / "log"), str(tmp_path)]) == 1


def test_small_set_tells_right_from_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    op = REGISTRY["nm24_linear"]
    few = tuple(case for case in op.cases if case.name in ("tail", "gt_tile"))
    for name in list(REGISTRY):
        monkeypatch.delitem(REGISTRY, name)
    monkeypatch.setitem(REGISTRY, "nm24_linear", replace(op, cases=few))
    assert gpu_small_set.main(["--dry-run"]) == 0
    assert "4 of 4 cases ran a kernel, 0 wrong" in capsys.readouterr().out
    monkeypatch.setitem(
        REGISTRY, "nm24_linear", replace(op, cases=few, fn=lambda *a, **k: op.fn(*a, **k) + 1)
    )
    assert gpu_small_set.main(["--dry-run"]) == 1
    assert "4 wrong" in capsys.readouterr().out
    assert gpu_small_set.main(["--dry-run", "--until", "1"]) == 1  # nothing ran


# ---- the summary


def work_rows(work: gpu_shapes.GpuWork) -> list[GpuRow]:
    common = {"op": work.op, "work": work.name, "dtype": work.tag, "source": work.source}
    dense = gpu_results.BASELINES[work.op]
    return [
        a_row(**common, contender=dense, plan="", picked=0, ms=0.75, ratio=1.0),
        a_row(**common),
        a_row(**common, plan="large/1", picked=0, ms=0.25, ratio=3.0),
        a_row(**common, plan="small/1", picked=0, ms=None, status="wrong: 7 of 9 elements are off"),
        *(
            a_row(**common, contender=name, plan="", picked=0, ms=None, ratio=ratio, status=status)
            for name, ratio, status in (
                ("cusparselt", 1.25, "ok"),
                ("cusparselt, searched", None, "failed: RuntimeError: " + 40 * "no such thing "),
                ("torch cutlass", None, "failed: x"),
            )
        ),
    ]


@pytest.fixture
def whole_run(tmp_path: Path) -> Path:
    """A run in which everything was measured and most went wrong."""
    facts = {
        "machine": "NVIDIA H999",
        "driver": "1",
        "commit": "abc",
        "date": "2999-01-01T00:00Z",
        "cuda": "13",
    }
    (tmp_path / "environment.json").write_text(json.dumps(facts))
    stages = [Stage(f"stage {i}", "failed", 100, "what it said " * 20) for i in range(10)]
    gpu_results.append(tmp_path / "stages.csv", stages)
    gpu_results.append(tmp_path / "tests.csv", [OpTests(op, 10, 1, 0) for op in REGISTRY])
    works = [work for make in gpu_shapes.WORKS.values() for work in make()]
    gpu_results.append(tmp_path / "layers.csv", [row for work in works for row in work_rows(work)])
    return tmp_path


def test_summary_of_a_whole_run_fits(whole_run: Path) -> None:
    lines = gpu_summary.summary(whole_run)
    assert len(lines) <= 60 and max(map(len, lines)) <= 110
    text = "\n".join(lines)
    assert "NVIDIA H999" in lines[0] and "commit abc" in lines[0]
    assert "nm24_linear bf16 squares: 1024 1.50/1.25  2048" in text
    heads = next(line for line in lines if line.startswith("nm24_linear bf16 tokens")).split()
    assert heads[3:] == ["1", "4", "16", "64", "256", "1024", "4096"]
    layer = next(line for line in lines if "4096->14336" in line)
    assert layer.split() == ["4096->14336", *["1.50/1.25"] * 7]
    assert "nm24_linear f16 layers, median: 1 tokens 1.50" in text
    assert "nm24_linear_i8 i8 squares" in text and "nm24_conv f16, batch 1 32 64" in text
    assert "3x3 256@14->256" in text and "3x3 128@56->128 /2" in text
    assert "2.00x nm24_linear 4096x4096->4096 bf16: large/1, not small/4" in text
    assert "wrong: 7 of 9 elements are off" in text and lines[-1].startswith("torch cutlass: ")


def test_summary_of_a_run_cut_off(tmp_path: Path) -> None:
    assert len(gpu_summary.summary(tmp_path)) == 2
    rows = work_rows(TINY)
    gpu_results.append(
        tmp_path / "layers.csv", [rows[0], replace(rows[1], status="wrong: x", ms=None, ratio=None)]
    )
    text = "\n".join(gpu_summary.summary(tmp_path))
    assert "128->64                     WRONG" in text and "ours, not ok: 1" in text


@pytest.mark.parametrize(
    ("mine", "text"),
    [
        ({}, "1.50/1.25"),
        ({"status": "failed: x", "ratio": None}, "FAILED/1.25"),
        ({"status": "not run: x", "ratio": None}, "-/1.25"),
    ],
)
def test_cell(mine: dict, text: str) -> None:
    rows = work_rows(TINY)
    assert gpu_summary.cell([rows[0], replace(rows[1], **mine), *rows[2:]]) == text
    assert gpu_summary.cell([]) == ""


# ---- the page


def test_page_is_up_to_date() -> None:
    page = gpu_table.PAGE.read_text()
    runs = [gpu_table.load(folder) for folder in gpu_results.kept_runs()]
    assert gpu_table.spliced(page, gpu_table.markdown(runs)) == page, "python -m benchmarks.gpu_table --write"
    assert "<!-- mutants: begin -->" in page and "<!-- mutants: end -->" in page


def test_every_cuda_kernel_is_on_the_page_and_never_run_says_so() -> None:
    text = gpu_table.markdown([])
    for op in REGISTRY.values():
        has_kernel = any(device == "cuda" for device, _ in op.impls)
        assert (f"| {op.name} |" in text) == has_kernel
    for tile in dispatch.MATRIX_TILES:
        assert f"| nm24_linear | {tile} | never run on hardware | | | |" in text
    assert set(gpu_table.TILES) <= set(REGISTRY)


def page_run(*rows: GpuRow, gpu: str = "NVIDIA H999", commit: str = "abc") -> gpu_table.Run:
    tests = {"nm24_linear": OpTests("nm24_linear", 9, 1, 0)}
    return gpu_table.Run(gpu, commit, list(rows), tests)


def test_page_shows_what_ran() -> None:
    rows = [a_row(ratio=ratio) for ratio in (1.0, 1.5, 2.5)]
    rows += [a_row(plan="large/2", picked=0), a_row(plan="few8/1", status="wrong: x", ratio=None)]
    text = gpu_table.markdown([page_run(commit="old"), page_run(*rows), page_run(gpu="NVIDIA A99")])
    line = "| nm24_linear | {} | NVIDIA H999 | `abc` | 9 passed, 1 failed | {} |"
    assert line.format("small", "1.50 (1.00 to 2.50, 3 layers)") in text
    assert line.format("large", "never picked") in text
    assert line.format("few8", "**wrong at 1 of 1 calls**") in text
    assert line.format("few16", "not measured") in text
    assert "| nm24_linear | few8 | NVIDIA A99 | `abc` |" in text and "old" not in text
    assert "| nm24_conv | large | never run on hardware | | | |" in text


def test_page_says_what_the_emulator_stands_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_table, "CONFORMANCE", tmp_path)
    assert "stands on documents (cross-checks)" in gpu_table.markdown([])
    (tmp_path / "nvidia-h999.txt").touch()
    assert "recorded: nvidia-h999.txt" in gpu_table.markdown([])


def test_splicing_needs_the_markers() -> None:
    with pytest.raises(ValueError, match="must hold"):
        gpu_table.spliced("no markers", "table")


def test_a_run_is_kept(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("results")
    (whole_run / "log.txt").write_text("long")
    (whole_run / "conformance.txt").write_text("recorded")
    kept = gpu_table.keep(whole_run, root, root)
    assert kept == root / "nvidia-h999" / "29990101T0000Z-abc" and gpu_results.kept_runs(root) == [kept]
    assert not (kept / "log.txt").exists()
    assert (root / "nvidia-h999.txt").read_text() == "recorded"
    loaded = gpu_table.load(kept)
    assert loaded.gpu == "NVIDIA H999" and loaded.tests["nm24_conv"].passed == 10
    assert loaded.rows == gpu_results.read(GpuRow, whole_run / "layers.csv")


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [({"dry_run": True}, "run on a GPU"), ({"commit": "unknown"}, "a known commit"), (None, "run on a GPU")],
)
def test_what_is_no_evidence_is_not_kept(whole_run: Path, changes: dict | None, refusal: str) -> None:
    file = whole_run / "environment.json"
    if changes is None:
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=refusal):
        gpu_table.keep(whole_run, whole_run / "kept", whole_run)


# ---- the script

SCRIPT = TREE / "benchmarks" / "gpu.sh"

# Python in the place of Python: notes what it is asked, and passes on what needs no GPU.
FAKE_PYTHON = """
echo "$* | $TORCH_CUDA_ARCH_LIST" >>"$CALLS"
case "$*" in
  "-m benchmarks.gpu_machine --arch") echo 9.0a ;;
  "-m benchmarks.gpu_machine "*) echo '{"machine": "made up"}' >"$OUT/environment.json"; echo "a GPU" ;;
  setup.py*) [[ $SCENE != no_build ]] || { echo "nvcc died"; exit 1; } ;;
  "-m pytest "*)
    echo "tests/test_ops.py::test_cuda[nm24_conv-x] PASSED [ 50%]"
    [[ $SCENE != slow ]] || sleep 60
    [[ $SCENE != red ]] || { echo "tests/test_ops.py::test_cuda[nm24_conv-y] FAILED [99%]"; exit 1; } ;;
  "-m benchmarks.gpu_run "*) echo "rows of $3" ;;
  "-m benchmarks.gpu_small_set "*) echo "small set" ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


def run_script(folder: Path, scene: str, **variables: str) -> tuple[int, dict[str, Stage], list[str], str]:
    """The exit status, the stages, what Python was asked, and what was printed."""
    out = folder / "out"
    program(folder, "bin/python", FAKE_PYTHON)
    program(
        folder,
        "bin/compute-sanitizer",
        'echo "sanitizer $* | $PYTORCH_NO_CUDA_MEMORY_CACHING" >>"$CALLS"\n'
        'while [[ $1 != *python ]]; do shift; done; "$@"; echo "========= ERROR SUMMARY: 0 errors"',
    )
    # nvcc makes a program that records a line, unless the scene says that it cannot
    program(
        folder,
        "bin/nvcc",
        "while [[ $1 != -o ]]; do shift; done; [[ $SCENE != no_nvcc ]] || exit 1\n"
        'printf "#!/bin/bash\\necho $SCENE \\$1; [[ $SCENE != no_record ]]\\n" >"$2"; chmod +x "$2"',
    )
    environment = {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "HOME": str(folder),
        "OUT": str(out),
        "PYTHON": str(folder / "bin" / "python"),
        "REAL_PYTHON": sys.executable,
        "CALLS": str(folder / "calls"),
        "SCENE": scene,
        **variables,
    }
    answer = subprocess.run(
        ["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=300
    )
    stages = {stage.stage: stage for stage in gpu_results.read(Stage, out / "stages.csv")}
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return answer.returncode, stages, calls, answer.stdout + answer.stderr


STAGES = [
    "environment",
    "build",
    "tests",
    "conformance",
    "nm24_linear",
    "nm24_linear_i8",
    "nm24_conv",
    "memcheck",
    "racecheck",
    "summary",
]


def test_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_script_runs_its_stages_in_order(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "layers.csv").write_text("from an earlier run")
    before = time.time()
    status, stages, calls, printed = run_script(tmp_path, "fine")
    assert status == 0, printed
    assert list(stages) == STAGES and {stage.status for stage in stages.values()} == {"ok"}
    assert not (tmp_path / "out" / "layers.csv").exists()
    assert any(call.startswith("setup.py") and call.endswith("build_ext --inplace | 9.0a") for call in calls)
    (tests,) = [call for call in calls if call.startswith("-m pytest ")]
    assert " -m cuda " in tests and " -v " in tests and "tests |" in tests
    assert stages["tests"].note == "1 passed, 0 failed, 0 skipped"
    assert gpu_results.read(OpTests, tmp_path / "out" / "tests.csv") == [OpTests("nm24_conv", 1, 0, 0)]
    for op in gpu_shapes.WORKS:
        (call,) = [call for call in calls if f"gpu_run {op} " in call]
        until = float(call.split("--until ")[1].split()[0])
        assert before < until < before + 540
    memcheck, racecheck = (call for call in calls if call.startswith("sanitizer"))
    assert "--tool memcheck" in memcheck and memcheck.endswith("| 1") and "kns=nm24" in memcheck
    assert "--tool racecheck" in racecheck and "--error-exitcode" in racecheck
    assert stages["memcheck"].note == "========= ERROR SUMMARY: 0 errors"
    assert printed.rstrip().endswith((tmp_path / "out" / "summary.txt").read_text().rstrip())
    assert "rows of nm24_conv" in (tmp_path / "out" / "log.txt").read_text()
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == [
        "conformance.txt",
        "environment.json",
        "log.txt",
        "stages.csv",
        "summary.txt",
        "tests.csv",
    ]
    assert (tmp_path / "out" / "conformance.txt").read_text() == "fine record\n"
    assert stages["conformance"].note == "1 lines"


@pytest.mark.parametrize("scene", ["no_nvcc", "no_record"])
def test_script_without_a_recording(tmp_path: Path, scene: str) -> None:
    status, stages, _, _ = run_script(tmp_path, scene)
    assert status == 1 and stages["conformance"].status == "failed" and stages["nm24_conv"].status == "ok"
    assert not (tmp_path / "out" / "conformance.txt").exists()


def test_script_without_a_build(tmp_path: Path) -> None:
    status, stages, calls, printed = run_script(tmp_path, "no_build")
    assert status == 1 and stages["build"].status == "failed" and "nvcc died" in printed
    assert stages["conformance"].status == stages["summary"].status == "ok"  # they need no build of ours
    others = set(STAGES[2:]) - {"conformance", "summary"}
    assert {stages[name].status for name in others} == {"not run"}
    assert not any("gpu_run" in call for call in calls)


def test_script_goes_on_after_a_red_test(tmp_path: Path) -> None:
    status, stages, _, printed = run_script(tmp_path, "red")
    assert status == 1 and stages["tests"].status == "failed"
    assert stages["tests"].note == "1 passed, 1 failed, 0 skipped" and "nm24_conv-y] FAILED" in printed
    assert {stages[name].status for name in STAGES[3:]} == {"ok"}


def test_script_cuts_what_does_not_fit(tmp_path: Path) -> None:
    start = time.time()
    status, stages, _, _ = run_script(tmp_path, "slow", LIMIT="30")
    assert time.time() - start < 30 and status == 1
    assert stages["tests"].status == "cut" and stages["tests"].note == "1 passed, 0 failed, 0 skipped"
    assert stages["nm24_linear"].status == "ok"
    assert "not run" in {stage.status for stage in stages.values()}
    (missed,) = {stage.note for stage in stages.values() if stage.status == "not run"}
    assert missed == "no time was left"


def test_script_on_the_cpu(tmp_path: Path) -> None:
    """All of it but the build, with the real Python."""
    sanitizer = '[[ $1 != --version ]] || exit 0; while [[ $1 != *python* ]]; do shift; done; exec "$@"'
    program(tmp_path, "bin/compute-sanitizer", sanitizer)
    kept = {name: os.environ[name] for name in ("SPARSEOPS_EMULATE", "LD_LIBRARY_PATH") if name in os.environ}
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
        "DRY_RUN": "1",
        **kept,
    }
    answer = subprocess.run(
        ["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=400
    )
    with (tmp_path / "out" / "stages.csv").open(newline="") as stream:
        stages = {line["stage"]: line["status"] for line in csv.DictReader(stream)}
    assert list(stages) == STAGES and set(stages.values()) == {"ok"}, answer.stdout + answer.stderr
    assert answer.returncode == 0
    rows = gpu_results.read(GpuRow, tmp_path / "out" / "layers.csv")
    assert {row.op for row in rows} == set(gpu_shapes.WORKS)
    assert "stand-in for a GPU" in (tmp_path / "out" / "summary.txt").read_text()
    with pytest.raises(ValueError, match="run on a GPU"):
        gpu_table.keep(tmp_path / "out", tmp_path / "kept", tmp_path)
