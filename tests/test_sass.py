"""What nvcc made of the CUDA kernels, read off the objects of this tree's build and what it said meanwhile:
matrix instructions that skip the zeros, no spills, registers, how wide the main loop reads, and for sm_90a
that products run in the background.

The main loop of a kernel is each innermost loop that holds matrix instructions.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sass import (
    Instruction,
    Kernel,
    architectures,
    is_product,
    loops_of,
    main_loops,
    read_code,
    read_kernels,
    read_usage,
)

TREE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TREE / "build_backend"))

import ninja_file  # noqa: E402

ARCHS = ("sm_80", "sm_90a")
# Kernels that are matrix products, by what their names hold, and the instruction that their time goes into.
PRODUCTS = {
    "nm24_linear_kernelINS_10TileConfigIa": "IMMA.SP",
    "nm24_linear_kernel": "HMMA.SP",
    "nm24_few_tokens_kernel": "HMMA.SP",
    "nm24_conv_kernel": "HMMA.SP",
    "nm24_grad_values_kernel": "HMMA",
    "nm24_linear_sm90_kernelINS_8Sm90TileIa": "IGMMA.SP",
    "nm24_linear_sm90_kernelINS_8Sm90TileI13__nv_fp8_e4m3": "QGMMA.SP",
    "nm24_linear_sm90_kernel": "HGMMA.SP",
    "nm24_conv_sm90_kernel": "HGMMA.SP",
}
LARGE_TILE = r"TileConfigI\w+?Li128ELi128E"
MOST_REGISTERS = 168

# Kernels with code for sm_90a alone: what else they must have somewhere, and what for.
SM90 = "_sm90_kernel"
SM90_NEEDS = {
    "UTMALDG": "loads by the copy engine",
    "UTMASTG": "stores by the copy engine",
    "USETMAXREG.DEALLOC": "registers given back",
    "USETMAXREG.TRY_ALLOC": "registers taken",
}
# In their main loops: a fence of the whole GPU, and what goes with an acquire of one.
SLOW_FENCE = r"MEMBAR\.\w+\.(GPU|SYS)|CCTL\.IVALL"

# What ptxas says, with exit status 0, when it ignores setmaxnreg or waits for every wgmma; and its warnings.
LOSSES = r"\(C7\d\d\d\)|[Pp]otential [Pp]erformance [Ll]oss|ptxas.*\bwarning\b"

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


# ---- the rules


def faults(kernel: Kernel, arch: str) -> Iterator[str]:
    """What is wrong with a kernel, a sentence each."""
    if kernel.stack or kernel.local:
        yield f"{kernel.stack} bytes of stack and {kernel.local} of local memory"
    if re.search(LARGE_TILE, kernel.name) and kernel.registers > MOST_REGISTERS:
        yield f"{kernel.registers} registers, more than {MOST_REGISTERS}"
    for instruction in kernel.code:
        if instruction.head in ("LDL", "STL"):
            yield f"{instruction.opcode} at {instruction.address:#x}"
    wanted = product_of(kernel, arch)
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
        if SM90 in kernel.name:
            yield from waits(loop)
    if SM90 in kernel.name:
        opcodes = {instruction.opcode for instruction in kernel.code}
        for needed, use in SM90_NEEDS.items():
            if not any(opcode.startswith(needed) for opcode in opcodes):
                yield f"no {needed}: {use}"


def product_of(kernel: Kernel, arch: str) -> str | None:
    """The instruction that a kernel's main loop must be made of, None where no rule asks for one."""
    if SM90 in kernel.name and arch != "sm_90a":
        return None  # an empty body
    return next((product for name, product in PRODUCTS.items() if name in kernel.name), None)


def waits(loop: list[Instruction]) -> Iterator[str]:
    """What keeps a main loop of wgmma from running in the background."""
    sums = set[int]().union(*(i.sums for i in loop))
    products = sum(is_product(i) for i in loop)
    depbars = sum(i.opcode.startswith("WARPGROUP.DEPBAR") for i in loop)
    if 2 * depbars > products:
        yield f"{depbars} waits for {products} products in the main loop"
    for instruction in loop:
        if re.match(SLOW_FENCE, instruction.opcode):
            yield f"{instruction.opcode} at {instruction.address:#x} in the main loop"
        elif not is_product(instruction) and instruction.registers & sums:
            yield f"{instruction.opcode} at {instruction.address:#x} takes part in the sums of the main loop"


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


def losses(log: str) -> list[str]:
    """The lines of what nvcc said that mean a slow kernel, or that ptxas was not sure of something."""
    return [line for line in log.splitlines() if re.search(LOSSES, line)]


# ---- this tree's build


def cuda_objects() -> list[Path]:
    """The objects of the kernels that the last build in this tree was made of."""
    folder = ninja_file.build_folder(TREE)
    plan = folder / "build.ninja"
    if not plan.exists():
        return []
    return [folder / name for name in re.findall(r"^build (obj/\S+): nvcc ", plan.read_text(), re.MULTILINE)]


OBJECTS = cuda_objects()
without_cuda = pytest.mark.skipif(not OBJECTS, reason="this tree was built without CUDA kernels")
every_object = pytest.mark.parametrize("file", OBJECTS, ids=lambda file: file.name.partition(".")[0])


@without_cuda
@every_object
def test_nvcc_had_nothing_to_say(file: Path) -> None:
    log = file.with_name(f"{file.name}.log")
    assert log.exists(), f"{file.name} lies there without what nvcc said: build again"
    assert losses(log.read_text()) == []


def _source_of(file: Path) -> str:
    source = TREE / "csrc" / "cuda" / file.name.removesuffix(".o")
    beside = source.with_suffix(".cuh")
    return source.read_text() + (beside.read_text() if beside.exists() else "")


def asked_for(file: Path) -> list[str]:
    """Those of ARCHS that the file of an object is for, by its first line."""
    items = _source_of(file).partition("\n")[0].partition("archs:")[2].split()
    return [arch for arch in ARCHS if arch.removeprefix("sm_") in items or {"all", "80+"} & set(items)]


@without_cuda
@pytest.mark.parametrize(
    "file, arch",
    [
        pytest.param(file, arch, id=f"{file.name.partition('.')[0]}-{arch}")
        for file in OBJECTS
        for arch in asked_for(file)
    ],
)
def test_kernels(file: Path, arch: str) -> None:
    if arch not in architectures(file):
        pytest.skip(f"this tree was built without machine code for {arch}")
    kernels = read_kernels(file, arch)
    assert kernels or not re.search(r"__global__", _source_of(file)), f"no kernel in {file.name}"
    wrong = [f"{kernel.name}: {fault}" for kernel in kernels for fault in faults(kernel, arch)]
    assert not wrong, "\n".join(wrong)


@without_cuda
def test_no_rule_and_no_excuse_is_idle() -> None:
    """A kernel that was renamed must not slip out of the rules for its kind."""
    built = {file: [arch for arch in ARCHS if arch in architectures(file)] for file in OBJECTS}
    if not all(built.values()):
        pytest.skip(f"this tree was built without machine code for {' and '.join(ARCHS)}")
    kernels = [(kernel, archs[0]) for file, archs in built.items() for kernel in read_kernels(file, archs[0])]
    names = [kernel.name for kernel, _ in kernels]
    assert [product for product in PRODUCTS if not any(product in name for name in names)] == []
    assert any(re.search(LARGE_TILE, name) for name in names)
    used = {
        excuse
        for kernel, arch in kernels
        if product_of(kernel, arch)
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
    assert list(faults(kernel(), "sm_80")) == []
    assert list(faults(kernel(INT8, product="IMMA.SP.16864.S8.S8"), "sm_80")) == []


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
    assert list(faults(kernel(**wrong), "sm_80")) == [fault]


def test_other_kernels_need_no_sparse_product_and_no_limit_of_registers() -> None:
    plain = "_ZN9sparseops20nm24_to_dense_kernelILi2EEEvPKv"
    assert (
        list(faults(kernel(plain, product="IMAD", registers=255, extra="LDG.E R2, [R2.64]"), "sm_80")) == []
    )


def test_a_load_that_is_excused(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = kernel(extra="LDGSTS.E.64 [R9], [R6.64]")
    assert len(list(faults(narrow, "sm_80"))) == 1
    monkeypatch.setattr(sys.modules[__name__], "NARROW", (("nm24_linear", r"LDGSTS\.E\.64", "a reason"),))
    assert list(faults(narrow, "sm_80")) == []
    assert len(list(faults(kernel(extra="LDG.E R2, [R2.64]"), "sm_80"))) == 1


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
    assert list(faults(kernel(**moved), "sm_80")) == ["LDG.E at 0xa0 in the main loop"]
    assert list(faults(kernel(cold="LDG.E R2, [R2.64]"), "sm_80")) == []  # nothing leads there


# ---- those for sm_90a

SM90_NAME = "_ZN9sparseops23nm24_linear_sm90_kernelINS_8Sm90TileI6__halfLi128ELi256ELi2ELi3ELb0EEEEEv"
SM90_INT8 = SM90_NAME.replace("6__half", "a")
HGMMA = "HGMMA.SP.64x256x32.F32"
SM90_LINES = {
    0x10: "USETMAXREG.DEALLOC.CTAPOOL 0x28",
    0x20: "UTMALDG.2D [UR16], [UR20], desc[UR22]",
    0x30: "MEMBAR.ALL.GPU",
    0x40: "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8",
    0x50: "LDS.128 R156, [R10+0x30000]",  # the main loop begins
    0x60: "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR41+0x31800], R8",
    0x70: "@!P0 BRA 0x0060",
    0x80: "WARPGROUP.ARRIVE",
    0x90: f"{HGMMA} R24, gdesc[UR20], R24, UP0, R156, 0x0",
    0xA0: f"{HGMMA} R24, gdesc[UR20], R24, R157, 0x0, gsb0",
    0xB0: "WARPGROUP.DEPBAR.LE gsb0, 0x1",
    0xC0: "@!P0 SYNCS.ARRIVE.TRANS64.RED.A1T0 RZ, [R9+URZ], RZ",
    0xD0: "IADD3 R0, R0, 0x1, RZ",
    0xE0: "@P1 BRA 0x0050",
    0xF0: "FADD R24, R24, R2",
    0x100: "UTMASTG.2D [UR20], [UR24]",
    0x110: "EXIT",
}


def sm90_kernel(name: str = SM90_NAME, **changes: str) -> Kernel:
    """The kernel of SM90_LINES, with other instructions at some addresses: ``_d0="MOV R1, R2"``."""
    lines = SM90_LINES | {int(address.strip("_"), 16): line for address, line in changes.items()}
    text = "\n".join(f"        /*{address:04x}*/   {line} ;" for address, line in lines.items())
    return Kernel(name, 168, 0, 0, read_code(f"\t\tFunction : {name}\n{text}\n")[name])


SM90_FP8 = SM90_NAME.replace("6__half", "13__nv_fp8_e4m3")


def products(opcode: str) -> dict[str, str]:
    """Other products in the places of the two."""
    return {place: SM90_LINES[int(place[1:], 16)].replace(HGMMA, opcode) for place in ("_90", "_a0")}


def test_a_good_kernel_of_sm_90a_has_no_fault() -> None:
    assert list(faults(sm90_kernel(), "sm_90a")) == []
    assert list(faults(sm90_kernel(SM90_INT8, **products("IGMMA.SP.64x256x64.S8.S8")), "sm_90a")) == []
    assert list(faults(sm90_kernel(SM90_FP8, **products("QGMMA.SP.64x256x64.F32.E4M3.E4M3")), "sm_90a")) == []
    empty = Kernel(SM90_NAME, 8, 0, 0, (Instruction(0, False, "EXIT", ""),))
    assert list(faults(empty, "sm_80")) == []
    assert "no loop with a matrix instruction" in list(faults(empty, "sm_90a"))


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"_10": "NOP"}, "no USETMAXREG.DEALLOC: registers given back"),
        ({"_40": "NOP"}, "no USETMAXREG.TRY_ALLOC: registers taken"),
        ({"_20": "UBLKCP.S.G [UR16], [UR20], UR22"}, "no UTMALDG: loads by the copy engine"),
        ({"_100": "NOP"}, "no UTMASTG: stores by the copy engine"),
        ({"_f0": "LDL R24, [R1]"}, "LDL at 0xf0"),
        ({"_d0": "MEMBAR.ALL.GPU"}, "MEMBAR.ALL.GPU at 0xd0 in the main loop"),
        ({"_d0": "MEMBAR.SC.SYS"}, "MEMBAR.SC.SYS at 0xd0 in the main loop"),
        ({"_d0": "CCTL.IVALL"}, "CCTL.IVALL at 0xd0 in the main loop"),
        ({"_d0": "MOV R24, R4"}, "MOV at 0xd0 takes part in the sums of the main loop"),
        ({"_d0": "MOV R2, R151"}, "MOV at 0xd0 takes part in the sums of the main loop"),
        ({"_d0": "@P3 STS.128 [R2], R22"}, "STS.128 at 0xd0 takes part in the sums of the main loop"),
        ({"_d0": "LDS.64 R23, [R2]"}, "LDS.64 at 0xd0 takes part in the sums of the main loop"),
        ({"_d0": "WARPGROUP.DEPBAR.LE gsb0, 0x0"}, "2 waits for 2 products in the main loop"),
        ({"_d0": "LDG.E R2, desc[UR4][R2.64]"}, "LDG.E at 0xd0 in the main loop"),
        (
            {"_90": "HGMMA.64x256x16.F32 R24, gdesc[UR20], R24, UP0"},
            "HGMMA.64x256x16.F32 in the main loop where HGMMA.SP is wanted",
        ),
        (
            {"name": SM90_INT8},
            "HGMMA.SP.64x256x32.F32 in the main loop where IGMMA.SP is wanted",
        ),
    ],
    ids=str,
)
def test_a_fault_of_sm_90a_is_seen(wrong: dict, fault: str) -> None:
    assert list(faults(sm90_kernel(**wrong), "sm_90a")) == [fault]


def test_what_is_allowed_in_a_main_loop_of_sm_90a() -> None:
    """Other registers, addresses beside the sums, a fence of the block."""
    for line in ("MOV R152, R23", "LDS.128 R152, [R23]", "ULEA UR24, UR25, UR26, 0x3", "MEMBAR.ALL.CTA"):
        assert list(faults(sm90_kernel(_d0=line), "sm_90a")) == []


# ---- reading


@pytest.mark.parametrize(
    ("line", "lost"),
    [
        ("ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored", True),
        ("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async serialized", True),
        ("ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async serialized", True),
        ("ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async serialized", True),
        ("ptxas info    : (C7517) warpgroup.wait is injected in around line 230 by compiler", True),
        ("ptxas a.ptx, line 9; warning : Instruction 'mma.sp' without '::ordered_metadata'", True),
        ("ptxas warning : Value of threads per SM for entry x is out of range", True),
        ("ptxas info    : Used 168 registers, used 1 barriers, 520 bytes cmem[0]", False),
        ("a.cu(3): warning #177-D: variable was declared but never referenced", False),
    ],
)
def test_losses_are_read_off_what_nvcc_says(line: str, lost: bool) -> None:
    assert losses(f"a.cu\n{line}\n") == ([line] if lost else [])


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
