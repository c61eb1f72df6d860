"""Compiles csrc/cuda.cu for every architecture and checks the machine code, without a GPU.

Prints what every kernel needs of a multiprocessor, and what one element costs in the kernels' main loops, in
instructions and in bytes: a roofline needs both. Exits with 1 if a rule is broken.

Standard library only.
"""

import importlib.metadata
import re
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from check_tools import compiler
from cuda_toolkit import (
    DEVICE_FLAGS,
    ToolkitError,
    architectures,
    host_compiler_flags,
    output_of,
    working_toolkit,
)

CSRC = Path(__file__).resolve().parents[1] / "csrc"
DISASSEMBLER = "nvdisasm"
MISSING_DISASSEMBLER = "nvdisasm is missing: pip install nvidia-cuda-nvdisasm"

MOST_KERNELS = 24
MOST_PARAMETER_BYTES = 32764
LEAST_OCCUPANCY = 0.5
# per element of the float32 sampling step, on the longest way through its loop
MOST_INSTRUCTIONS = {80: 70, 90: 70, 100: 70}

REGISTERS = 1 << 16  # of every multiprocessor


class Multiprocessor(NamedTuple):
    """The limits in the CUDA programming guide's table of compute capabilities."""

    threads: int
    blocks: int
    shared_bytes: int
    reserved_bytes: int  # of shared memory, per block


MULTIPROCESSORS = {
    75: Multiprocessor(1024, 16, 64 << 10, 0),
    80: Multiprocessor(2048, 32, 164 << 10, 1 << 10),
    86: Multiprocessor(1536, 16, 100 << 10, 1 << 10),
    89: Multiprocessor(1536, 24, 100 << 10, 1 << 10),
    90: Multiprocessor(2048, 32, 228 << 10, 1 << 10),
    100: Multiprocessor(2048, 32, 228 << 10, 1 << 10),
    120: Multiprocessor(1536, 24, 100 << 10, 1 << 10),
}


# ---------------------------------------------------------------------------------------- kernels


def enumerators(source):
    """{(type, value): name}, without the leading k, of all C++ enumerations in the source."""
    names = {}
    for kind, body in re.findall(r"enum class (\w+)[^{;]*{([^}]*)}", source):
        for position, (name, value) in enumerate(re.findall(r"\bk(\w+)(?: = (\d+))?", body)):
            names[kind, int(value or position)] = name
    return names


NAMES = enumerators("".join(CSRC.joinpath("core", name).read_text() for name in ("langevin.h", "storage.h")))
# per element: the parameter and its momentum
STORED_BYTES = {"Float32": 8, "BFloat16": 6, "Float16": 6, "BFloat16Both": 4}


class Kernel(NamedTuple):
    function: str
    integrator: str = ""
    format: str = ""

    def __str__(self):
        return " ".join(filter(None, self))

    @property
    def is_streaming(self):
        """Do its float32 main loops decide its speed?"""
        return self.function == "step_chunks" and self.format in STORED_BYTES


def kernel_of(symbol):
    """From a mangled name."""
    match = re.match(r"_ZN4ctld\d+([a-z_]+?)(?:I((?:LNS_\d+[A-Z]\w*?E\dE)+)E)?E", symbol)
    if match is None:
        raise ValueError(f"{symbol} is none of our kernels")
    arguments = re.findall(r"LNS_\d+(\w+?)E(\d)E", match[2] or "")
    return Kernel(match[1], *(NAMES[kind, int(value)] for kind, value in arguments))


# -------------------------------------------------------------------------------------- resources


class Resources(NamedTuple):
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int


def number_before(unit, text):
    match = re.search(rf"(\d+) {unit}", text)
    return int(match[1]) if match else 0


def resources_of(listing):
    """{symbol: Resources}, from what ptxas prints with -v."""
    found = {}
    for paragraph in listing.split("Compiling entry function '")[1:]:
        found[paragraph.partition("'")[0]] = Resources(
            registers=number_before("registers", paragraph),
            shared_bytes=number_before("bytes smem", paragraph),
            stack_bytes=number_before("bytes stack frame", paragraph),
            spill_stores=number_before("bytes spill stores", paragraph),
            spill_loads=number_before("bytes spill loads", paragraph),
        )
    return found


def round_up(number, unit):
    return -(-number // unit) * unit


def occupancy(resources, sm, threads_per_block):
    """The share of a multiprocessor's threads that can be resident."""
    limits = MULTIPROCESSORS[sm]
    # registers are handed out in units of 256 per warp, to four warps at a time
    warps = REGISTERS // round_up(32 * resources.registers, 256) // 4 * 4
    shared = round_up(resources.shared_bytes + limits.reserved_bytes, 256)
    blocks = min(
        limits.blocks,
        limits.threads // threads_per_block,
        warps // (threads_per_block // 32),
        limits.shared_bytes // shared if shared else limits.blocks,
    )
    return blocks * threads_per_block / limits.threads


def resource_problems(resources, sm, threads_per_block):
    if resources.stack_bytes or resources.spill_stores or resources.spill_loads:
        yield (
            f"{resources.stack_bytes} bytes of stack, {resources.spill_stores} of spill stores,"
            f" {resources.spill_loads} of spill loads"
        )
    share = occupancy(resources, sm, threads_per_block)
    if share < LEAST_OCCUPANCY:
        yield (
            f"{resources.registers} registers, {resources.shared_bytes} bytes of shared memory:"
            f" an occupancy of {share:.0%} only"
        )


def parameter_bytes(disassembly):
    """{symbol: size of the kernel's parameters}."""
    size = r"EIATTR_CBANK_PARAM_SIZE.*?\.short\s+(0x[0-9a-f]+)"
    sections = re.split(r"\.section\s+\.nv\.info\.", disassembly)[1:]
    return {
        section.partition(",")[0]: int(re.search(size, section, re.DOTALL)[1], 16) for section in sections
    }


def threads_per_block(header):
    """From the text of csrc/cuda_arguments.h."""
    return int(re.search(r"\bkThreads = (\d+);", header)[1])


# ----------------------------------------------------------------------------------- instructions


class Instruction(NamedTuple):
    guard: str  # @P0, or nothing
    opcode: str  # with its modifiers
    operands: str
    targets: tuple = ()  # indices

    @property
    def name(self):
        return self.opcode.partition(".")[0]

    @property
    def jumps(self):
        return self.name in ("BRA", "BRX", "JMP", "JMX")

    @property
    def may_fall_through(self):
        """Does the next instruction follow for some threads?"""
        if self.guard:
            return True
        if self.jumps:
            return not self.operands.startswith("`")  # the condition can be an operand
        return self.name not in ("EXIT", "RET")


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/ +(?:(@!?U?P\w+) +)?([A-Z][\w.]*) *([^;]*?) *;")
LABEL = re.compile(r"(\.L_\w+):")


def instructions_of(text):
    """The instructions in one function's disassembly."""
    labels, parsed = {}, []
    for line in text.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(parsed)
        elif match := INSTRUCTION.search(line):
            parsed.append(Instruction(match[1] or "", match[2], match[3]))
    return [
        one._replace(targets=tuple(labels[name] for name in re.findall(r"\.L_\w+", one.operands)))
        if one.jumps
        else one
        for one in parsed
    ]


def functions_of(disassembly):
    """{symbol: instructions}."""
    sections = re.split(r"^\.text\.(\S+):$", disassembly, flags=re.MULTILINE)
    return dict(zip(sections[1::2], map(instructions_of, sections[2::2]), strict=True))


# ------------------------------------------------------------------------------------------ loops


def successors_of(instructions):
    return [
        {*one.targets, *([i + 1] if one.may_fall_through and i + 1 < len(instructions) else [])}
        for i, one in enumerate(instructions)
    ]


def back_edges(successors):
    """The edges that close a loop: those to an instruction on the way to where they start."""
    edges, on_the_way, seen = [], {0}, {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        here, pending = stack[-1]
        for there in pending:
            if there in on_the_way:
                edges.append((here, there))
            elif there not in seen:
                seen.add(there)
                on_the_way.add(there)
                stack.append((there, iter(successors[there])))
                break
        else:
            on_the_way.remove(here)
            stack.pop()
    return edges


def innermost_loops(successors):
    """{first instruction: the set of all} of the loops that contain no other."""
    predecessors = [set() for _ in successors]
    for here, follow in enumerate(successors):
        for there in follow:
            predecessors[there].add(here)
    bodies = {}
    for last, first in back_edges(successors):
        body = bodies.setdefault(first, {first})
        pending = [last]
        while pending:
            here = pending.pop()
            if here not in body:
                body.add(here)
                pending.extend(predecessors[here])
    return {first: body for first, body in bodies.items() if not (body & bodies.keys()) - {first}}


def way_around(successors, first, body, choose):
    """The instructions passed once around a loop that contains no other; `choose` is max or min."""
    inside = {here: (successors[here] & body) - {first} for here in body}
    length, following = {}, {}
    for here in TopologicalSorter(inside).static_order():
        options = [(length[there], there) for there in inside[here]]
        if first in successors[here]:
            options.append((0, None))
        steps, following[here] = choose(options, key=lambda option: option[0])
        length[here] = steps + 1
    way = [first]
    while following[way[-1]] is not None:
        way.append(following[way[-1]])
    return way


KINDS = {
    "integer multiply": r"U?IMAD(?!\.(MOV|SHL|IADD))|U?IMUL",
    "float": r"F(ADD|MUL|FMA|SEL|SETP|SET|MNMX|CHK|SWZADD)|MUFU|H(ADD|MUL|FMA|SET)|D(ADD|MUL|FMA|SETP|MNMX)",
    "conversion": r"U?(I2|F2)|FRND",
    "memory": r"(LD|ST)[GSLC]?(?![A-Z])|U?LDCU?|LDSM|ATOM|RED(?!UX)|CCTL",
    "control": r"BRA|BRX|JM[PX]|EXIT|RET|CALL|BSSY|BSYNC|BREAK|BMOV|WARPSYNC|BAR|DEPBAR|MEMBAR|NOP|YIELD",
    "other integer": "",
}
PHILOX = (0xD2511F53, 0xCD9E8D57)
GLOBAL_LOADS, GLOBAL_STORES = ("LDG", "LD"), ("STG", "ST")  # or generic, if the compiler cannot tell
FLOAT64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|\w+.*(\.F64|64H)")


def kind_of(instruction):
    return next(kind for kind, names in KINDS.items() if re.match(names, instruction.opcode))


def is_vector(access):
    return ".128" in access.opcode


def immediates(instruction):
    """The integers among the operands, without their sign."""
    return [int(digits, 16) % (1 << 32) for digits in re.findall(r"-?0x[0-9a-f]+", instruction.operands)]


class Loop(NamedTuple):
    """All instructions of a loop, and those passed once around on the longest and on the shortest way."""

    body: list
    longest: list
    shortest: list

    @property
    def has_noise(self):
        return set(PHILOX) <= {number for one in self.body for number in immediates(one)}

    @property
    def moved_bytes(self):
        accesses = [one for one in self.longest if one.name in GLOBAL_LOADS + GLOBAL_STORES]
        return 16 * sum(map(is_vector, accesses))

    def elements(self, kernel):
        vectors = sum(is_vector(one) for one in self.longest if one.name in GLOBAL_STORES)
        return 16 * vectors / STORED_BYTES[kernel.format]


def main_loops(instructions):
    """The innermost loops that store whole vectors each time around."""
    successors = successors_of(instructions)
    for first, body in innermost_loops(successors).items():
        ways = (way_around(successors, first, body, choose) for choose in (max, min))
        loop = Loop(*([instructions[i] for i in indices] for indices in (sorted(body), *ways)))
        if any(one.name in GLOBAL_STORES and is_vector(one) for one in loop.longest):
            yield loop


def listed(instructions):
    counts = Counter(one.opcode for one in instructions)
    return ", ".join(f"{count} {opcode}" for opcode, count in counts.items())


def access_problems(loop):
    accesses = [one for one in loop.body if one.name in GLOBAL_LOADS + GLOBAL_STORES]
    if narrow := [one for one in accesses if not is_vector(one)]:
        yield f"accesses narrower than 128 bits: {listed(narrow)}"
    if generic := [one for one in accesses if one.name in ("LD", "ST")]:
        yield f"accesses not known to be to global memory: {listed(generic)}"
    if local := [one for one in loop.body if one.name in ("LDL", "STL")]:
        yield f"accesses to local memory: {listed(local)}"


def arithmetic_problems(loop, kernel):
    if double := [one for one in loop.body if FLOAT64.match(one.opcode)]:
        yield f"float64: {listed(double)}"
    # Two roots for four elements, each with two fused multiply-adds. Everything else is rounded one by one.
    expected = loop.elements(kernel) / 2 if kernel.integrator != "MomentumSgd" else 0
    roots = sum(one.opcode.startswith("MUFU.RSQ") for one in loop.body)
    fused = sum(one.name == "FFMA" for one in loop.body)
    if (roots, fused) != (expected, 2 * expected):
        yield f"{roots} roots, {fused} fused multiply-adds instead of {expected:g}, {2 * expected:g}"


def cost_problems(loop, kernel, sm):
    per_element = len(loop.longest) / loop.elements(kernel)
    if kernel.format == "Float32" and per_element > MOST_INSTRUCTIONS[sm]:
        yield f"{per_element:.1f} instructions per element, more than {MOST_INSTRUCTIONS[sm]}"


def loop_problems(loops, kernel, sm):
    """What is wrong with the main loops of a streaming kernel."""
    if not any(loop.has_noise or kernel.integrator == "MomentumSgd" for loop in loops):
        yield "no main loop"
    for loop in loops:
        yield from access_problems(loop)
        yield from arithmetic_problems(loop, kernel)
        yield from cost_problems(loop, kernel, sm)


# ----------------------------------------------------------------------------- compile and report


class Code(NamedTuple):
    """What nvcc makes of csrc/cuda.cu for one architecture, by kernel."""

    sm: int
    resources: dict
    # from the disassembly, if there is one
    parameter_bytes: dict
    loops: dict  # of the streaming kernels


def find_disassembler(nvcc):
    try:
        packed = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        packed = []
    candidates = [
        DISASSEMBLER,
        Path(nvcc).with_name(DISASSEMBLER),
        f"/usr/local/cuda/bin/{DISASSEMBLER}",
        *(path.locate() for path in packed if path.name == DISASSEMBLER),
    ]
    return next(filter(None, map(shutil.which, map(str, candidates))), None)


def by_kernel(symbols):
    return {kernel_of(symbol): value for symbol, value in symbols.items()}


def compiled(toolkit, disassembler, directory, sm):
    cubin = Path(directory, f"sm_{sm}.cubin")
    listing = output_of(
        toolkit.nvcc,
        *DEVICE_FLAGS,
        *host_compiler_flags(compiler()),
        *("-Werror", "all-warnings", "-Xptxas", "-v", f"-I{CSRC}", f"-arch=sm_{sm}"),
        *("-cubin", str(CSRC / "cuda.cu"), "-o", str(cubin)),
    )
    disassembly = output_of(disassembler, str(cubin)) if disassembler and sm in MOST_INSTRUCTIONS else ""
    loops = {
        kernel: list(main_loops(code))
        for kernel, code in by_kernel(functions_of(disassembly)).items()
        if kernel.is_streaming
    }
    return Code(sm, by_kernel(resources_of(listing)), by_kernel(parameter_bytes(disassembly)), loops)


def compile_everything(toolkit, disassembler, directory):
    """One Code per architecture; raises ToolkitError if it does not compile without warnings."""
    numbers = architectures(output_of(toolkit.nvcc, "--list-gpu-code"))
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(partial(compiled, toolkit, disassembler, directory), numbers))


def labelled(code, kernel, problems):
    return [f"{kernel}, sm_{code.sm}: {problem}" for problem in problems]


def all_resource_problems(code, threads):
    for kernel, resources in code.resources.items():
        yield from labelled(code, kernel, resource_problems(resources, code.sm, threads))


def all_loop_problems(code):
    for kernel, loops in code.loops.items():
        yield from labelled(code, kernel, loop_problems(loops, kernel, code.sm))


def problems_of(code, threads):
    """All broken rules, as text."""
    if len(code.resources) > MOST_KERNELS:
        yield f"{len(code.resources)} kernels, more than {MOST_KERNELS}"
    yield from all_resource_problems(code, threads)
    yield from all_loop_problems(code)
    for kernel, size in code.parameter_bytes.items():
        if size > MOST_PARAMETER_BYTES:
            yield from labelled(
                code, kernel, [f"{size} bytes of parameters, more than {MOST_PARAMETER_BYTES}"]
            )


def table(rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.rjust, row, widths)) for row in rows)
    return "\n".join(lines) + "\n"


def resource_table(codes, threads):
    def cell(code, kernel):
        needs = code.resources[kernel]
        spilled = "" if needs.spill_stores + needs.stack_bytes == 0 else " spills"
        return f"{needs.registers}/{occupancy(needs, code.sm, threads):.0%}{spilled}"

    header = ["registers/occupancy", *(f"sm_{code.sm}" for code in codes)]
    kernels = sorted(codes[0].resources)
    return table([header, *([str(kernel), *(cell(code, kernel) for code in codes)] for kernel in kernels)])


def loop_row(kernel, sm, loop):
    elements = loop.elements(kernel)
    kinds = Counter(map(kind_of, loop.longest))
    energies = sum(one.name == "F2I" for one in loop.longest)
    costs = [energies, loop.moved_bytes, len(loop.shortest), len(loop.longest), *(kinds[k] for k in KINDS)]
    return [str(kernel), f"sm_{sm}", f"{elements:g}", *(f"{cost / elements:.1f}" for cost in costs)]


def loop_table(codes):
    header = ["main loop", "", "elements", "energies", "bytes", "shortest", "longest", *KINDS]
    rows = [
        loop_row(kernel, code.sm, loop)
        for code in codes
        for kernel in sorted(code.loops)
        for loop in code.loops[kernel]
    ]
    return table([header, *rows])


def main():
    try:
        toolkit = working_toolkit(compiler())
        disassembler = find_disassembler(toolkit.nvcc)
        with tempfile.TemporaryDirectory() as directory:
            codes = compile_everything(toolkit, disassembler, directory)
    except ToolkitError as error:
        return f"error: {error}"
    threads = threads_per_block((CSRC / "cuda_arguments.h").read_text())
    print(resource_table(codes, threads))
    if disassembler:
        print("Per element; the kinds of instructions on the longest way through the loop:")
        print(loop_table(codes))
    else:
        print(f"note: the main loops are not checked: {MISSING_DISASSEMBLER}")
    problems = [problem for code in codes for problem in problems_of(code, threads)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
