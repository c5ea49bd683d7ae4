"""What nvcc made of the CUDA kernels, read off the objects of this tree's build: matrix instructions that
skip the zeros, no spills, registers, and how wide the main loop reads.

The main loop of a kernel is each innermost loop that holds matrix instructions. Loops are found by dominance:
a branch to an instruction that every path to the branch passes closes a loop, whose body is what leads back
to the branch without leaving through its head, wherever the compiler has put it.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TREE / "build_backend"))

import ninja_file  # noqa: E402
import toolchain  # noqa: E402

ARCHS = ("sm_80", "sm_90a")
# Kernels that are matrix products, by what their names hold, and the instruction that their time goes into.
PRODUCTS = {
    "nm24_linear_kernelINS_10TileConfigIa": "IMMA.SP",
    "nm24_linear_kernel": "HMMA.SP",
    "nm24_few_tokens_kernel": "HMMA.SP",
    "nm24_conv_kernel": "HMMA.SP",
    "nm24_grad_values_kernel": "HMMA",
}
LARGE_TILE = r"TileConfigI\w+?Li128ELi128E"
MOST_REGISTERS = 168

# (kernel, load, reason): what may be narrower than 16 bytes a thread in a main loop.
NARROW = (
    (
        "nm24_few_tokens_kernel",
        r"LDGSTS\.E\.64",
        "groups of four columns of x change places on the way; 8 bytes of 32 lanes make whole lines",
    ),
    (
        r"nm24_conv_kernel\w+Li8EEEv",
        r"LDGSTS\.E\.64",
        "for channels that are 4 more than a multiple of 8: every other pixel begins 8 bytes off",
    ),
)


# ---- reading cuobjdump


@dataclass(frozen=True)
class Instruction:
    address: int
    predicated: bool
    opcode: str
    operands: str

    @property
    def head(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes, None for everything else."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.head in ("BRA", "JMP") else None
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Kernel:
    """A kernel of one architecture: its mangled name, what it takes, its instructions."""

    name: str
    registers: int
    stack: int
    local: int
    code: tuple[Instruction, ...] = ()


USAGE = re.compile(r"^ *Function (\S+):\n.*?REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", re.MULTILINE)
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)


def read_usage(text: str) -> dict[str, Kernel]:
    """The answer to ``--dump-resource-usage`` for one architecture."""
    found = [Kernel(name, *map(int, numbers)) for name, *numbers in USAGE.findall(text)]
    return {kernel.name: kernel for kernel in found}


def read_code(text: str) -> dict[str, tuple[Instruction, ...]]:
    """The answer to ``-sass`` for one architecture, by kernel."""
    parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.MULTILINE)
    return {
        name: tuple(
            Instruction(int(address, 16), bool(predicate), opcode, operands.strip())
            for address, predicate, opcode, operands in LINE.findall(body)
        )
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


# ---- loops


def blocks_of(code: tuple[Instruction, ...]) -> tuple[list[range], list[list[int]]]:
    """The basic blocks as ranges of instructions, and the blocks that each may go on to."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    leaders = {0}
    for i, instruction in enumerate(code):
        if instruction.target is not None and instruction.target in index:
            leaders.add(index[instruction.target])
        if instruction.head in ("BRA", "JMP", "EXIT", "RET", "BRX"):
            leaders.add(i + 1)
    starts = sorted(leaders - {len(code)})
    blocks = [range(start, end) for start, end in zip(starts, [*starts[1:], len(code)], strict=True)]
    number = {block.start: i for i, block in enumerate(blocks)}
    follow: list[list[int]] = []
    for i, block in enumerate(blocks):
        last = code[block[-1]]
        targets = [number[index[last.target]]] if last.target is not None and last.target in index else []
        # `BRA P5, 0x..` is conditional without a predicate before it
        conditional = last.predicated or "," in last.operands
        falls = conditional or last.head not in ("BRA", "JMP", "EXIT", "RET", "BRX")
        follow.append(targets + ([i + 1] if falls and i + 1 < len(blocks) else []))
    return blocks, follow


def loops_of(code: tuple[Instruction, ...]) -> list[list[Instruction]]:
    """The instructions of every loop."""
    blocks, follow = blocks_of(code)
    reached, ahead = set(), [0]
    before: list[list[int]] = [[] for _ in blocks]
    while ahead:
        if (block := ahead.pop()) not in reached:
            reached.add(block)
            ahead += follow[block]
            for target in follow[block]:
                before[target].append(block)
    everything = (1 << len(blocks)) - 1
    dominators = [1, *[everything] * (len(blocks) - 1)]  # bit b of entry a: every path to a passes b
    changed = True
    while changed:
        changed = False
        for block in reached - {0}:
            common = everything
            for predecessor in before[block]:
                common &= dominators[predecessor]
            common |= 1 << block
            changed, dominators[block] = changed or common != dominators[block], common
    bodies: dict[int, set[int]] = {}
    for block in reached:
        for head in follow[block]:
            if dominators[block] >> head & 1:
                body = bodies.setdefault(head, {head})
                grow = [block]
                while grow:
                    if (member := grow.pop()) not in body:
                        body.add(member)
                        grow += before[member]
    return [[code[i] for block in sorted(body) for i in blocks[block]] for body in bodies.values()]


def is_product(instruction: Instruction) -> bool:
    return instruction.head in ("HMMA", "IMMA")


def main_loops(code: tuple[Instruction, ...]) -> list[list[Instruction]]:
    """The innermost loops with matrix instructions."""
    holding = [loop for loop in loops_of(code) if any(map(is_product, loop))]
    addresses = [{instruction.address for instruction in loop} for loop in holding]
    return [
        loop
        for loop, own in zip(holding, addresses, strict=True)
        if not any(other < own for other in addresses)
    ]


# ---- the rules


def faults(kernel: Kernel) -> Iterator[str]:
    """What is wrong with a kernel, a sentence each."""
    if kernel.stack or kernel.local:
        yield f"{kernel.stack} bytes of stack and {kernel.local} of local memory"
    if re.search(LARGE_TILE, kernel.name) and kernel.registers > MOST_REGISTERS:
        yield f"{kernel.registers} registers, more than {MOST_REGISTERS}"
    for instruction in kernel.code:
        if instruction.head in ("LDL", "STL"):
            yield f"{instruction.opcode} at {instruction.address:#x}"
    wanted = next((product for name, product in PRODUCTS.items() if name in kernel.name), None)
    if wanted is None:
        return
    loops = main_loops(kernel.code)
    if not loops:
        yield "no loop with a matrix instruction"
    for loop in loops:
        products = {i.opcode for i in loop if is_product(i)}
        if other := sorted(
            p for p in products if (".".join(p.split(".")[: wanted.count(".") + 1])) != wanted
        ):
            yield f"{', '.join(other)} in the main loop where {wanted} is wanted"
        for instruction in loop:
            if is_narrow_load(instruction) and not excuses(kernel, instruction):
                yield f"{instruction.opcode} at {instruction.address:#x} in the main loop"


def is_narrow_load(instruction: Instruction) -> bool:
    """A load from global memory, also one straight to shared memory, of fewer than 16 bytes a thread."""
    return instruction.head in ("LDG", "LDGSTS", "LD") and "128" not in instruction.opcode.split(".")


def excuses(kernel: Kernel, instruction: Instruction) -> list[tuple[str, str, str]]:
    """The lines of NARROW that let it pass."""
    return [
        line
        for line in NARROW
        if re.search(line[0], kernel.name) and re.fullmatch(line[1], instruction.opcode)
    ]


# ---- this tree's build


def cuda_objects() -> list[Path]:
    """The objects of the kernels that the last build in this tree was made of."""
    folder = ninja_file.build_folder(TREE)
    plan = folder / "build.ninja"
    if not plan.exists():
        return []
    return [folder / name for name in re.findall(r"^build (obj/\S+): nvcc ", plan.read_text(), re.MULTILINE)]


@cache
def cuobjdump() -> tuple[str, str]:
    """The toolkit's cuobjdump, else the one of NVIDIA's wheel, and the folder of its nvdisasm."""
    candidates = []
    if nvcc := toolchain.find_nvcc():
        candidates.append(nvcc.root() / "bin")
    if found := shutil.which("cuobjdump"):
        candidates.append(Path(found).parent)
    if spec := importlib.util.find_spec("nvidia"):
        for folder in spec.submodule_search_locations or []:
            candidates += [path / "bin" for path in sorted(Path(folder).glob("cu[0-9]*"), reverse=True)]
    for folder in candidates:
        if (folder / "cuobjdump").exists() and (folder / "nvdisasm").exists():
            return str(folder / "cuobjdump"), str(folder)
    raise AssertionError("neither CUDA's toolkit nor a wheel has cuobjdump: pip install -e '.[test]'")


def dump(file: Path, *options: str) -> str:
    program, folder = cuobjdump()
    command = [program, *options, str(file)]
    answer = subprocess.run(command, capture_output=True, text=True, env={"PATH": f"{folder}:/usr/bin:/bin"})
    assert answer.returncode == 0, f"{' '.join(command)}: {answer.stderr}"
    return answer.stdout


@cache
def read_kernels(file: Path, arch: str) -> list[Kernel]:
    usage = read_usage(dump(file, "--dump-resource-usage", "-arch", arch))
    code = read_code(dump(file, "-sass", "-arch", arch))
    assert usage.keys() == code.keys()
    return [Kernel(k.name, k.registers, k.stack, k.local, code[k.name]) for k in usage.values()]


OBJECTS = cuda_objects()
without_cuda = pytest.mark.skipif(not OBJECTS, reason="this tree was built without CUDA kernels")


@without_cuda
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("file", OBJECTS, ids=lambda file: file.name.partition(".")[0])
def test_kernels(file: Path, arch: str) -> None:
    if arch not in dump(file, "-lelf"):
        pytest.skip(f"this tree was built without machine code for {arch}")
    kernels = read_kernels(file, arch)
    assert kernels or not re.search(r"__global__", _source_of(file)), f"no kernel in {file.name}"
    wrong = [f"{kernel.name}: {fault}" for kernel in kernels for fault in faults(kernel)]
    assert not wrong, "\n".join(wrong)


def _source_of(file: Path) -> str:
    source = TREE / "csrc" / "cuda" / file.name.removesuffix(".o")
    beside = source.with_suffix(".cuh")
    return source.read_text() + (beside.read_text() if beside.exists() else "")


@without_cuda
def test_no_rule_and_no_excuse_is_idle() -> None:
    """A kernel that was renamed must not slip out of the rules for its kind."""
    archs = [arch for arch in ARCHS if arch in dump(OBJECTS[0], "-lelf")]
    if not archs:
        pytest.skip(f"this tree was built without machine code for {' and '.join(ARCHS)}")
    kernels = [kernel for file in OBJECTS for kernel in read_kernels(file, archs[0])]
    names = [kernel.name for kernel in kernels]
    assert [product for product in PRODUCTS if not any(product in name for name in names)] == []
    assert any(re.search(LARGE_TILE, name) for name in names)
    used = {
        excuse
        for kernel in kernels
        for loop in main_loops(kernel.code)
        for instruction in filter(is_narrow_load, loop)
        for excuse in excuses(kernel, instruction)
    }
    assert used == set(NARROW)


# ---- the rules themselves

NAME = "_ZN9sparseops18nm24_linear_kernelINS_10TileConfigI6__halfLi128ELi128ELi64ELi64ELi3EEEEEvNS_8CudaPlanE"
INT8 = NAME.replace("6__half", "a")

SASS = """
	code for sm_80
		Function : {name}
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   MOV R1, c[0x0][0x28] ;                          /* 0x00000a0000017a02 */
                                                                                   /* 0x000fe20000000f00 */
        /*0010*/                   LDG.E R2, [R2.64] ;                             /* 0x0000000402027981 */
        /*0020*/              @!P0 BRA 0x0050 ;                                    /* 0x0000002000008947 */
        /*0030*/                   LDGSTS.E.BYPASS.128 [R9+0x3400], [R6.64], P2 ;  /* 0x0000000006097fae */
        /*0040*/                   {extra} ;                                       /* 0x0000000006097fae */
        /*0050*/                   LDSM.16.M88.4 R4, [R10] ;                       /* 0x000000000a04783b */
        /*0060*/                   {product} R8, R4, R12, R8, R20, 0x0 ;           /* 0x0000000c0408723c */
        /*0070*/               @P1 BRA 0x0020 ;                                    /* 0xffffffa000000947 */
        /*0080*/                   {behind} ;                                      /* 0x0000000006097fae */
        /*0090*/                   EXIT ;                                          /* 0x000000000000794d */
        /*00a0*/                   {cold} ;                                        /* 0x0000000006097fae */
        /*00b0*/                   BRA 0x0070 ;                                    /* 0xffffffb000007947 */
        /*00c0*/                   BRA 0xc0;                                       /* 0xfffffff000007947 */
"""


def kernel(
    name: str = NAME,
    registers: int = 168,
    stack: int = 0,
    local: int = 0,
    product: str = "HMMA.SP.16832.F32",
    extra: str = "IADD3 R0, R0, 0x1, RZ",
    behind: str = "LDG.E.U16 R2, [R2.64]",
    cold: str = "IADD3 R0, R0, 0x1, RZ",
) -> Kernel:
    text = SASS.format(name=name, product=product, extra=extra, behind=behind, cold=cold)
    return Kernel(name, registers, stack, local, read_code(text)[name])


def test_a_good_kernel_has_no_fault() -> None:
    assert list(faults(kernel())) == []
    assert list(faults(kernel(INT8, product="IMMA.SP.16864.S8.S8"))) == []


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"stack": 80}, "80 bytes of stack and 0 of local memory"),
        ({"local": 8}, "0 bytes of stack and 8 of local memory"),
        ({"registers": 169}, "169 registers, more than 168"),
        ({"behind": "STL.64 [R1+0x8], R2"}, "STL.64 at 0x80"),
        ({"extra": "LDL R2, [R1]"}, "LDL at 0x40"),
        ({"extra": "LDG.E R2, [R2.64]"}, "LDG.E at 0x40 in the main loop"),
        ({"extra": "LDG.E.64.CONSTANT R2, [R2.64]"}, "LDG.E.64.CONSTANT at 0x40 in the main loop"),
        ({"extra": "LD.E.U16 R2, [R2.64]"}, "LD.E.U16 at 0x40 in the main loop"),
        ({"extra": "LDGSTS.E [R9], [R6.64]"}, "LDGSTS.E at 0x40 in the main loop"),
        ({"product": "HMMA.16816.F32"}, "HMMA.16816.F32 in the main loop where HMMA.SP is wanted"),
        (
            {"extra": "HMMA.16816.F32 R0, R4, R8, R0"},
            "HMMA.16816.F32 in the main loop where HMMA.SP is wanted",
        ),
        ({"product": "FFMA"}, "no loop with a matrix instruction"),
        (
            {"name": INT8},
            "HMMA.SP.16832.F32 in the main loop where IMMA.SP is wanted",
        ),
    ],
    ids=str,
)
def test_a_fault_is_seen(wrong: dict, fault: str) -> None:
    assert list(faults(kernel(**wrong))) == [fault]


def test_other_kernels_need_no_sparse_product_and_no_limit_of_registers() -> None:
    plain = "_ZN9sparseops20nm24_to_dense_kernelILi2EEEvPKv"
    assert list(faults(kernel(plain, product="IMAD", registers=255, extra="LDG.E R2, [R2.64]"))) == []


def test_a_load_that_is_excused(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = kernel(extra="LDGSTS.E.64 [R9], [R6.64]")
    assert len(list(faults(narrow))) == 1
    monkeypatch.setattr(sys.modules[__name__], "NARROW", (("nm24_linear", r"LDGSTS\.E\.64", "a reason"),))
    assert list(faults(narrow)) == []
    assert len(list(faults(kernel(extra="LDG.E R2, [R2.64]")))) == 1


def test_the_innermost_loop_is_the_main_loop() -> None:
    """A loop around it may load what it likes, and so may one that shares its end but no product."""
    lines = (
        "0010 LDG.E R2, [R2.64]",  # outer loop
        "0020 LDG.E.128 R4, [R2.64]",  # main loop
        "0030 HMMA.SP.16832.F32 R8, R4, R12, R8, R20, 0x0",
        "0040 @P1 BRA 0x0020",
        "0050 @P0 BRA 0x0010",
        "0060 LDG.E R2, [R2.64]",  # a loop without a product
        "0070 @P0 BRA 0x0060",
        "0080 EXIT",
    )
    text = "\n".join(f"        /*{line[:4]}*/   {line[5:]} ;" for line in lines)
    code = read_code(f"\t\tFunction : {NAME}\n{text}\n")[NAME]
    assert len(loops_of(code)) == 3
    assert [[i.address for i in loop] for loop in main_loops(code)] == [[0x20, 0x30, 0x40]]


def test_code_out_of_line_belongs_to_the_loop_that_it_returns_to() -> None:
    """Compilers move the unlikely part of a loop behind the kernel's end."""
    moved = {"extra": "@P3 BRA 0x00a0", "cold": "LDG.E R2, [R2.64]"}
    assert list(faults(kernel(**moved))) == ["LDG.E at 0xa0 in the main loop"]
    assert list(faults(kernel(cold="LDG.E R2, [R2.64]"))) == []  # nothing leads there


def test_usage_is_read() -> None:
    text = (
        "Resource usage:\n Common:\n  GLOBAL:0\n Function one:\n"
        "  REG:130 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:520 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
        " Function two:\n  REG:168 STACK:80 SHARED:1024 LOCAL:4 CONSTANT[0]:520 TEXTURE:0\n"
    )
    assert read_usage(text) == {"one": Kernel("one", 130, 0, 0), "two": Kernel("two", 168, 80, 4)}


def test_only_the_objects_of_the_last_build_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ninja_file, "build_folder", lambda _: tmp_path)
    assert cuda_objects() == []
    (tmp_path / "build.ninja").write_text(
        "build obj/cuda/device.cu.o: nvcc ../../csrc/cuda/device.cu | x\nbuild obj/bindings.o: cxx b.cpp\n"
    )
    assert cuda_objects() == [tmp_path / "obj" / "cuda" / "device.cu.o"]
