"""Machine code of CUDA kernels, as cuobjdump prints it: instructions, loops, registers.

Loops are found by dominance: a branch to an instruction that every path to the branch passes closes a loop,
whose body is what leads back to the branch without leaving through its head, wherever the compiler has put
it.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

TREE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TREE / "build_backend"))

import toolchain  # noqa: E402


class Instruction(NamedTuple):
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

    @property
    def registers(self) -> set[int]:
        """The numbers of the registers that it reads or writes; a wide operand is several."""
        words = 4 if ".128" in self.opcode else 2 if ".64" in self.opcode else 1
        numbers: set[int] = set()
        for bracket, number in re.findall(r"(\[[^]]*\])|(?<!\w)R(\d+)", self.operands):
            if bracket:
                numbers |= {int(n) for n in re.findall(r"(?<!\w)R(\d+)", bracket)}
            else:
                numbers |= set(range(int(number), int(number) + words))
        return numbers

    @property
    def sums(self) -> set[int]:
        """The registers with the sums of a warpgroup's product; none for everything else."""
        found = re.search(r"\.64x(\d+)x\d+", self.opcode) if self.head in WARPGROUP_PRODUCTS else None
        first = re.match(r"R(\d+)", self.operands)
        return set(range(int(first[1]), int(first[1]) + int(found[1]) // 2)) if found and first else set()


@dataclass(frozen=True)
class Kernel:
    """A kernel of one architecture: its mangled name, what it takes, its instructions."""

    name: str
    registers: int
    stack: int
    local: int
    code: tuple[Instruction, ...] = ()


WARPGROUP_PRODUCTS = ("HGMMA", "IGMMA", "QGMMA")
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
            Instruction(int(address, 16), bool(predicate), sys.intern(opcode), operands.strip())
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
        for block in sorted(reached - {0}):
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
    return instruction.head in ("HMMA", "IMMA", *WARPGROUP_PRODUCTS)


def main_loops(code: tuple[Instruction, ...]) -> list[list[Instruction]]:
    """The innermost loops with matrix instructions."""
    holding = [loop for loop in loops_of(code) if any(map(is_product, loop))]
    addresses = [{instruction.address for instruction in loop} for loop in holding]
    return [
        loop
        for loop, own in zip(holding, addresses, strict=True)
        if not any(other < own for other in addresses)
    ]


# ---- cuobjdump


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


def architectures(file: Path) -> set[str]:
    """Those that an object has machine code for."""
    return set(re.findall(r"\.(sm_\w+)\.cubin", dump(file, "-lelf")))


@cache
def read_kernels(file: Path, arch: str) -> list[Kernel]:
    usage = read_usage(dump(file, "--dump-resource-usage", "-arch", arch))
    code = read_code(dump(file, "-sass", "-arch", arch))
    assert usage.keys() == code.keys()
    return [Kernel(k.name, k.registers, k.stack, k.local, code[k.name]) for k in usage.values()]
