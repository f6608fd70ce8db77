"""The report on the kernels finds the steps in a disassembled program. Compiling them needs NVIDIA's packages."""

from benchmarks.kernel_report import _loops
from benchmarks.kernel_schedule import MULTIPROCESSORS, finish_time

# Two loops with tensor core products, one without, and behind the end a wait that branches back into the second.
PROGRAM = """
.L_x_1:
        /*0010*/                   FFMA R1, R1, R2, R3 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/              @!P0 BRA `(.L_x_9) ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0060*/              @!P0 BRA `(.L_x_4) ;
.L_x_3:
   -:-:-:Y:01        /*0070*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24
        /*0080*/               @P1 BRA `(.L_x_2) ;
.L_x_8:
        /*0090*/               @P1 BRA `(.L_x_8) ;
        /*00a0*/                   EXIT ;
.L_x_4:
        /*00b0*/               @P0 BRA `(.L_x_3) ;
.L_x_9:
"""


def test_the_loops_of_a_program_are_those_with_products_and_no_end_inside() -> None:
    assert [len(loop) for loop in _loops(PROGRAM)] == [4, 4]


def test_a_tile_goes_to_the_multiprocessor_that_is_free_first() -> None:
    assert finish_time([5] * MULTIPROCESSORS) == 5
    assert finish_time([5] * MULTIPROCESSORS + [1]) == 6
    assert finish_time([9, *[1] * (MULTIPROCESSORS - 1), 2, 7]) == 9
