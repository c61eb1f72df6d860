"""The machine code of the CUDA kernels, for every architecture that nvcc knows. Needs no GPU.

The rules are in tools/check_cuda.py; the listings recorded here show that it notices when one is broken.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import check_cuda
import cuda_toolkit
from check_cuda import Kernel, Resources
from check_tools import compiler

# ------------------------------------------------------------------------- the kernels as they are


@pytest.fixture(scope="session")
def toolkit():
    try:
        return cuda_toolkit.working_toolkit(compiler())
    except cuda_toolkit.ToolkitError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def disassembler(toolkit):
    return check_cuda.find_disassembler(toolkit.nvcc)


@pytest.fixture(scope="session")
def codes(toolkit, disassembler, tmp_path_factory):
    return check_cuda.compile_everything(toolkit, disassembler, tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def disassembled(codes, disassembler):
    if disassembler is None:
        pytest.skip(check_cuda.MISSING_DISASSEMBLER)
    return [code for code in codes if code.loops]


@pytest.mark.long
def test_kernels_are_few(codes):
    assert 0 < len(codes[0].resources) <= check_cuda.MOST_KERNELS


@pytest.mark.long
def test_kernels_keep_their_variables_in_registers_and_fill_the_processor(codes):
    threads = check_cuda.threads_per_block((check_cuda.CSRC / "cuda_arguments.h").read_text())
    assert [problem for code in codes for problem in check_cuda.all_resource_problems(code, threads)] == []


@pytest.mark.long
def test_parameters_fit(disassembled):
    for code in disassembled:
        assert code.parameter_bytes.keys() == code.resources.keys()
        assert max(code.parameter_bytes.values()) <= check_cuda.MOST_PARAMETER_BYTES


@pytest.mark.long
def test_main_loops_are_lean(disassembled):
    assert disassembled
    print(check_cuda.loop_table(disassembled))
    assert [problem for code in disassembled for problem in check_cuda.all_loop_problems(code)] == []


# -------------------------------------------------------------------------------------- resources

SYMBOL = "_ZN4ctld11step_chunksILNS_10IntegratorE0ELNS_6FormatE0EEEvNS_13StepArgumentsE"
FLOAT32 = Kernel("step_chunks", "Baoab", "Float32")
THREADS = 128

PTXAS = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{SYMBOL}' for 'sm_90'
ptxas info    : Function properties for {SYMBOL}
    24 bytes stack frame, 40 bytes spill stores, 36 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 24 bytes cumulative stack size, 4256 bytes smem
ptxas info    : Compile time = 481.166 ms
ptxas info    : Compiling entry function '_ZN4ctld15prior_of_chunksENS_13StepArgumentsE' for 'sm_90'
ptxas info    : Function properties for _ZN4ctld15prior_of_chunksENS_13StepArgumentsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, 33008 bytes cmem[0]
"""


def test_symbols_are_read():
    assert check_cuda.kernel_of(SYMBOL) == FLOAT32
    assert check_cuda.kernel_of("_ZN4ctld15prior_of_chunksENS_13StepArgumentsE") == Kernel("prior_of_chunks")
    with pytest.raises(ValueError, match="none of our kernels"):
        check_cuda.kernel_of("_Z5probev")


def test_enumerators_are_read():
    source = "enum class A { kOne = 1, kZero = 0 };\nenum class B : int { kFirst, kSecond } b;"
    assert check_cuda.enumerators(source) == {
        **{("A", 1): "One", ("A", 0): "Zero"},
        **{("B", 0): "First", ("B", 1): "Second"},
    }


def test_resources_are_read():
    assert check_cuda.by_kernel(check_cuda.resources_of(PTXAS)) == {
        FLOAT32: Resources(registers=64, shared_bytes=4256, stack_bytes=24, spill_stores=40, spill_loads=36),
        Kernel("prior_of_chunks"): Resources(32, 0, 0, 0, 0),
    }


def test_the_threads_per_block_are_read():
    assert check_cuda.threads_per_block("constexpr uint32_t kThreads = 128;  // per block") == 128


def test_every_architecture_has_limits():
    assert tuple(check_cuda.MULTIPROCESSORS) == cuda_toolkit.GPU_ARCHITECTURES
    assert check_cuda.MOST_INSTRUCTIONS.keys() <= check_cuda.MULTIPROCESSORS.keys()


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "sm", "expected"),
    [
        (64, 0, 75, 1.0),  # 8 blocks of 128 threads, of the 1024 that fit
        (64, 4256, 90, 0.5),
        (65, 0, 90, 7 / 16),
        (32, 0, 90, 1.0),
        (64, 0, 89, 2 / 3),
        (80, 0, 86, 0.5),
        (81, 0, 86, 5 / 12),
        (32, 40 << 10, 90, 5 / 16),  # 5 blocks' shared memory
    ],
)
def test_occupancy(registers, shared_bytes, sm, expected):
    assert check_cuda.occupancy(Resources(registers, shared_bytes, 0, 0, 0), sm, THREADS) == expected


@pytest.mark.parametrize(
    ("resources", "problem"),
    [
        (Resources(64, 4256, 24, 0, 0), "24 bytes of stack"),
        (Resources(64, 4256, 0, 4, 0), "4 of spill stores"),
        (Resources(64, 4256, 0, 0, 4), "4 of spill loads"),
        (Resources(65, 4256, 0, 0, 0), "65 registers, 4256 bytes of shared memory: an occupancy of 44% only"),
    ],
)
def test_wasted_resources_are_noticed(resources, problem):
    (found,) = check_cuda.resource_problems(resources, 90, THREADS)
    assert problem in found


def test_frugal_kernels_are_accepted():
    assert list(check_cuda.resource_problems(Resources(64, 4256, 0, 0, 0), 90, THREADS)) == []


# -------------------------------------------------------------------------------------- main loops

SASS = f"""\
	.section	.nv.info.{SYMBOL},"",@"SHT_CUDA_INFO"
	//----- nvinfo : EIATTR_CBANK_PARAM_SIZE
	.align		4
.L_239:
        /*00fc*/ 	.byte	0x03, 0x19
        /*00fe*/ 	.short	0x7ee0

	.section	.text.{SYMBOL},"ax",@progbits
{SYMBOL}:
.text.{SYMBOL}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_10:
        /*0010*/                   LDG.E.64 R2, desc[UR6][R32.64] ;
        /*0020*/              @!P0 BRA `(.L_x_14) ;
.L_x_11:
        /*0030*/                   IMAD.WIDE.U32 R4, R4, -0x2daee0ad, RZ ;
        /*0040*/                   IMAD.WIDE.U32 R6, R6, -0x326172a9, RZ ;
        /*0050*/                   LDG.E.128 R20, desc[UR6][R40.64] ;
        /*0060*/                   LDG.E.128 R24, desc[UR6][R42.64] ;
        /*0070*/                   BSSY B1, `(.L_x_12) ;
        /*0080*/              @!P1 BRA P2, `(.L_x_13) ;
        /*0090*/                   LDG.E.EF.128 R16, desc[UR6][R26.64] ;
        /*00a0*/                   FADD R16, R16, R17 ;
.L_x_13:
        /*00b0*/                   BSYNC B1 ;
.L_x_12:
        /*00c0*/                   I2FP.F32.S32 R8, R4 ;
        /*00d0*/                   MUFU.RSQ R9, R8 ;
        /*00e0*/                   FFMA R10, -R9, R9, R8 ;
        /*00f0*/                   FFMA R10, R10, R9, R8 ;
        /*0100*/                   MUFU.RSQ R11, R8                                (*"note"*);
        /*0110*/                   FFMA R12, -R11, R11, R8 ;
        /*0120*/                   FFMA R12, R12, R11, R8 ;
        /*0130*/                   FMUL R12, R12, 0.5 ;
        /*0140*/                   STG.E.EF.128 desc[UR6][R42.64], R16 ;
        /*0150*/                   STG.E.128 desc[UR6][R40.64], R20 ;
        /*0160*/                   ISETP.GE.U32.AND P0, PT, R2, UR23, PT ;
        /*0170*/               @P0 BRA `(.L_x_11) ;
.L_x_14:
        /*0180*/                   LDG.E R2, desc[UR6][R2.64] ;
        /*0190*/                   IMAD.WIDE.U32 R4, R4, -0x2daee0ad, RZ ;
        /*01a0*/                   IMAD.WIDE.U32 R6, R6, -0x326172a9, RZ ;
        /*01b0*/                   DADD R8, R8, R8 ;
        /*01c0*/                   STG.E desc[UR6][R2.64], R4 ;
        /*01d0*/               @P3 BRA `(.L_x_14) ;
        /*01e0*/               @P4 BRA `(.L_x_10) ;
        /*01f0*/                   EXIT ;
.L_x_15:
        /*0200*/                   BRA `(.L_x_15);
        /*0210*/                   NOP;
"""


def main_loops(sass):
    (instructions,) = check_cuda.functions_of(sass).values()
    return list(check_cuda.main_loops(instructions))


def problems_in(sass, kernel=FLOAT32):
    return list(check_cuda.loop_problems(main_loops(sass), kernel, 90))


def planted(line):
    """The listing with one more instruction in its main loop."""
    return SASS.replace("FMUL R12", f"{line} ;\n        /*0138*/                   FMUL R12")


def test_the_size_of_the_parameters_is_read():
    assert check_cuda.parameter_bytes(SASS) == {SYMBOL: 0x7EE0}


def test_the_main_loop_is_the_innermost_with_vector_stores():
    (loop,) = main_loops(SASS)
    assert loop.body[0].operands == "R4, R4, -0x2daee0ad, RZ"
    assert (len(loop.body), len(loop.longest), len(loop.shortest)) == (21, 21, 19)
    assert loop.has_noise
    assert loop.elements(FLOAT32) == 4
    assert loop.moved_bytes == 5 * 16


def test_a_lean_loop_is_accepted():
    assert problems_in(SASS) == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("FFMA R1, R2, R3, R4", "2 roots, 5 fused multiply-adds instead of 2, 4"),
        ("FFMA.FTZ R1, R2, R3, R4", "2 roots, 5 fused multiply-adds instead of 2, 4"),
        ("MUFU.RSQ R1, R2", "3 roots, 4 fused multiply-adds instead of 2, 4"),
        ("LDG.E R1, desc[UR6][R2.64]", "accesses narrower than 128 bits: 1 LDG.E"),
        ("LDG.E.U16.CONSTANT R1, desc[UR6][R2.64]", "accesses narrower than 128 bits: 1 LDG.E.U16.CONSTANT"),
        ("@P1 STG.E.64 desc[UR6][R2.64], R4", "accesses narrower than 128 bits: 1 STG.E.64"),
        ("LD.E.128 R4, desc[UR6][R2.64]", "accesses not known to be to global memory: 1 LD.E.128"),
        ("STL [R1+0x3c], R5", "accesses to local memory: 1 STL"),
        ("LDL.LU R5, [R1+0x3c]", "accesses to local memory: 1 LDL.LU"),
        ("DADD R2, R2, 1", "float64: 1 DADD"),
        ("F2F.F64.F32 R10, R0", "float64: 1 F2F.F64.F32"),
        ("F2F.F32.F64 R10, R0", "float64: 1 F2F.F32.F64"),
        ("MUFU.RCP64H R5, R23", "float64: 1 MUFU.RCP64H"),
    ],
)
def test_what_does_not_belong_into_a_main_loop_is_noticed(line, problem):
    assert problems_in(planted(line)) == [problem]


def test_code_outside_the_main_loop_does_not_matter():
    assert problems_in(SASS.replace("DADD R8", "FFMA R8, R8, R8, R8 ;\n  /*01b8*/  DADD R8")) == []


def test_costly_loops_are_noticed():
    room = 4 * check_cuda.MOST_INSTRUCTIONS[90] - 21
    filler = " ;\n        /*0138*/                   ".join(["LOP3.LUT R1, R2, R3, RZ, 0x3c, !PT"] * room)
    assert problems_in(planted(filler)) == []
    (found,) = problems_in(planted(f"{filler} ;\n        /*0139*/                   MOV R1, R2"))
    assert found == "70.2 instructions per element, more than 70"


def test_a_missing_main_loop_is_noticed():
    assert problems_in(SASS.replace("STG.E.128", "STG.E").replace("STG.E.EF.128", "STG.E")) == [
        "no main loop"
    ]
    assert problems_in(SASS.replace("-0x326172a9", "R4")) == ["no main loop"]


def test_without_noise_there_are_no_roots():
    assert problems_in(SASS, FLOAT32._replace(integrator="MomentumSgd")) == [
        "2 roots, 4 fused multiply-adds instead of 0, 0"
    ]


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("IMAD.WIDE.U32", "integer multiply"),
        ("IMAD.MOV.U32", "other integer"),
        ("LOP3.LUT", "other integer"),
        ("SHF.L.U32", "other integer"),
        ("FFMA", "float"),
        ("MUFU.RSQ", "float"),
        ("I2FP.F32.S32", "conversion"),
        ("F2I.TRUNC.NTZ", "conversion"),
        ("LDG.E.128", "memory"),
        ("LEA.HI.X", "other integer"),
        ("ULDC.64", "memory"),
        ("BSSY", "control"),
    ],
)
def test_instructions_are_sorted_by_kind(opcode, kind):
    assert check_cuda.kind_of(check_cuda.Instruction("", opcode, "")) == kind
