"""Tests the reader of compiled programs on the forms in which each platform's compiler writes collectives."""

from __future__ import annotations

import pytest

from jax_simpo.plan.hlo import Work, collectives, gpu_work, loop_states, loop_traffic

# Cut out of programs compiled by libtpu 0.0.42 and by XLA for CPU and GPU.
TPU_LOOP = """HloModule jit_accumulate, is_scheduled=true

%body.1 (p.1: (u32[], bf16[256,1024], f32[32,1,64,8])) -> (u32[], bf16[256,1024], f32[32,1,64,8]) {
  %two.1 = u32[]{:T(128)} constant(2)
  %p.1 = (u32[]{:T(128)}, bf16[256,1024]{1,0:T(8,128)(2,1)S(1)}, f32[32,1,64,8]{3,2,1,0}) parameter(0)
  %i.1 = u32[]{:T(128)} get-tuple-element(%p.1), index=0
  %x.1 = bf16[256,1024]{1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %s.1 = f32[32,1,64,8]{3,2,1,0} get-tuple-element(%p.1), index=2
  %cp.1 = (bf16[256,1024]{1,0}, bf16[256,1024]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x.1), \
channel_id=3, source_target_pairs={{0,1},{1,0}}, metadata={op_name="a/dot_general"}
  %cpd.1 = bf16[256,1024]{1,0:T(8,128)(2,1)} collective-permute-done(%cp.1)
  %j.1 = u32[]{:T(128)} add(%i.1, %two.1)
  ROOT %t.1 = (u32[], bf16[256,1024], f32[32,1,64,8]) tuple(%j.1, %cpd.1, %s.1)
}

%cond.1 (p.2: (u32[], bf16[256,1024], f32[32,1,64,8])) -> pred[] {
  %p.2 = (u32[]{:T(128)}, bf16[256,1024]{1,0}, f32[32,1,64,8]{3,2,1,0}) parameter(0)
  %n.2 = u32[]{:T(128)} constant(8)
  %i.2 = u32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%i.2, %n.2), direction=LT
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%all-reduce-scatter (input: f32[64,128]) -> f32[16,128] {
  %input = f32[64,128]{1,0} parameter(0)
  %ar = f32[64,128]{1,0} all-reduce(%input), channel_id=9, to_apply=%sum, metadata={op_name="head"}
  %at = s32[] constant(0)
  ROOT %ds = f32[16,128]{1,0} dynamic-slice(%ar, %at, %at), dynamic_slice_sizes={16,128}
}

%starts (q.1: bf16[16,64]) -> (bf16[16,64], bf16[64,64], u32[]) {
  %q.1 = bf16[16,64]{1,0} parameter(0)
  %ag.1 = bf16[64,64]{1,0} all-gather(%q.1), channel_id=5, dimensions={0}
  ROOT %c.1 = (bf16[16,64], bf16[64,64], u32[]) custom-call(%q.1, %ag.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (q.2: bf16[16,64], r.2: bf16[64,64]) -> bf16[64,64] {
  %q.2 = bf16[16,64]{1,0} parameter(0)
  %r.2 = bf16[64,64]{1,0} parameter(1)
  %ag.2 = bf16[64,64]{1,0} all-gather(%q.2), channel_id=5, dimensions={0}
  ROOT %m.2 = bf16[64,64]{1,0} multiply(%ag.2, %r.2)
}

%ends (q.3: bf16[16,64], r.3: bf16[64,64]) -> bf16[64,64] {
  %q.3 = bf16[16,64]{1,0} parameter(0)
  %r.3 = bf16[64,64]{1,0} parameter(1)
  %ag.3 = bf16[64,64]{1,0} all-gather(%q.3), channel_id=5, dimensions={0}
  ROOT %c.3 = bf16[64,64]{1,0} custom-call(%q.3, %r.3, %ag.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main.1_spmd (x: bf16[256,1024], y: f32[64,128], z: bf16[16,64]) -> f32[16,128] {
  %x = bf16[256,1024]{1,0} parameter(0)
  %y = f32[64,128]{1,0} parameter(1)
  %z = bf16[16,64]{1,0} parameter(2)
  %zero = u32[]{:T(128)} constant(0)
  %kept = f32[32,1,64,8]{3,2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %copy.1 = u32[]{:T(128)} copy(%zero)
  %state = (u32[], bf16[256,1024], /*index=2*/f32[32,1,64,8]) tuple(%copy.1, %x, %kept)
  %while.1 = (u32[]{:T(128)}, bf16[256,1024]{1,0}, f32[32,1,64,8]{3,2,1,0}) while(%state), \
condition=%cond.1, body=%body.1
  %async-collective-start = (bf16[16,64], bf16[64,64], u32[]) fusion(%z), kind=kCustom, calls=%starts
  %g = bf16[64,64]{1,0} get-tuple-element(%async-collective-start), index=1
  %fusion.1 = bf16[64,64]{1,0} fusion(%z, %g), kind=kLoop, calls=%async_collective_fusion.7
  %async-collective-done = bf16[64,64]{1,0} fusion(%z, %g), kind=kCustom, calls=%ends
  ROOT %f = f32[16,128]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
}
"""

OTHERS = """HloModule jit_accumulate

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%wrapped (w: f32[64,32]) -> f32[8,32] {
  %w = f32[64,32]{1,0} parameter(0)
  ROOT %rs = f32[8,32]{1,0} reduce-scatter(%w), channel_id=4, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%sum
}

%body (p: (s32[], f32[8,32])) -> (s32[], f32[8,32]) {
  %p = (s32[], f32[8,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,32]{1,0} get-tuple-element(%p), index=1
  %ag = (f32[8,32]{1,0}, f32[64,32]{1,0}) all-gather-start(%x), channel_id=1, dimensions={0}
  %agd = f32[64,32]{1,0} all-gather-done(%ag)
  %a2a = ((f32[64,32]{1,0}), f32[64,32]{1,0}) all-to-all-start(%agd), channel_id=6, dimensions={0}
  %a2ad = f32[64,32]{1,0} all-to-all-done(%a2a)
  %rs = ((f32[64,32]{1,0}), f32[8,32]{1,0}) async-start(%a2ad), calls=%wrapped
  %rsd = f32[8,32]{1,0} async-done(%rs)
  ROOT %t = (s32[], f32[8,32]{1,0}) tuple(%i, %rsd)
}

%cond (p.2: (s32[], f32[8,32])) -> pred[] {
  %p.2 = (s32[], f32[8,32]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%p.2), index=0
  ROOT %lt = pred[] custom-call(%n), custom_call_target="depends_on_data"
}

ENTRY %main (x: f32[8,32]) -> f32[8,32] {
  %x = f32[8,32]{1,0} parameter(0)
  %i = s32[] constant(0)
  %ar = (f32[8,32]{1,0}, f32[8,32]{1,0}) all-reduce-start(%x, %x), channel_id=2, to_apply=%sum
  %ard = (f32[8,32]{1,0}, f32[8,32]{1,0}) all-reduce-done(%ar)
  %state = (s32[], f32[8,32]{1,0}) tuple(%i, %x)
  %while = (s32[], f32[8,32]{1,0}) while(%state), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %r = f32[8,32]{1,0} get-tuple-element(%while), index=1
}
"""


def summaries(hlo: str) -> list[tuple[str, int, int]]:
    """Returns kind, bytes and count of each collective."""
    return [(c.kind, c.bytes, c.times) for c in collectives(hlo)]


def test_a_tpu_loop_runs_as_often_as_its_counter_says_and_a_fused_collective_counts_once() -> None:
    assert summaries(TPU_LOOP) == [
        ("collective-permute", 2 * 256 * 1024, 4),  # from 0 to 8 in steps of 2
        ("all-gather", 2 * 64 * 64, 1),  # start, continuation and end are one collective
        ("reduce-scatter", 4 * 64 * 128, 1),  # the complete array that is reduced
    ]


def test_started_and_wrapped_collectives_count_once_and_by_their_whole_arrays() -> None:
    assert summaries(OTHERS) == [
        ("all-reduce", 2 * 4 * 8 * 32, 1),
        ("all-gather", 4 * 64 * 32, 5),
        ("all-to-all", 4 * 64 * 32, 5),
        ("reduce-scatter", 4 * 64 * 32, 5),
    ]


def test_the_state_of_a_loop_is_read_with_its_trip_count() -> None:
    assert loop_states(TPU_LOOP) == [(4, (("u32", ()), ("bf16", (256, 1024)), ("f32", (32, 1, 64, 8))))]


def test_a_collective_in_a_loop_of_unknown_length_is_refused() -> None:
    unknown = OTHERS.replace('backend_config={"known_trip_count":{"n":"5"}}', "")
    with pytest.raises(ValueError, match="all-gather in a loop of unknown length: while"):
        collectives(unknown)


GPU_LOOPS = """HloModule jit_attend, is_scheduled=true

%sliced (p0: f32[8,100], p1: s32[], p2: f32[1,100]) -> f32[8,100] {
  %p0 = f32[8,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[1,100]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %old = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,100}
  %new = f32[1,100]{1,0} add(%old, %p2)
  ROOT %dus = f32[8,100]{1,0} dynamic-update-slice(%p0, %new, %p1, %zero)
}

%body (b: (s32[], f32[8,100], f32[1,100])) -> (s32[], f32[8,100], f32[1,100]) {
  %b = (s32[], f32[8,100]{1,0}, f32[1,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[8,100]{1,0} get-tuple-element(%b), index=1
  %y = f32[1,100]{1,0} get-tuple-element(%b), index=2
  %f = f32[8,100]{1,0} fusion(%x, %i, %y), kind=kLoop, calls=%sliced
  ROOT %t = (s32[], f32[8,100], f32[1,100]) tuple(%i, %f, %y)
}

%test (c: (s32[], f32[8,100], f32[1,100])) -> pred[] {
  %c = (s32[], f32[8,100]{1,0}, f32[1,100]{1,0}) parameter(0)
  %go = pred[] constant(true)
  ROOT %copy = pred[] copy(%go)
}

ENTRY %main (a: s32[], m: f32[8,100], n: f32[1,100]) -> f32[8,100] {
  %a = s32[] parameter(0)
  %m = f32[8,100]{1,0} parameter(1)
  %n = f32[1,100]{1,0} parameter(2)
  %s = (s32[], f32[8,100]{1,0}, f32[1,100]{1,0}) tuple(%a, %m, %n)
  %w = (s32[], f32[8,100]{1,0}, f32[1,100]{1,0}) while(%s), condition=%test, body=%body, KNOWN
  %r = f32[8,100]{1,0} get-tuple-element(%w), index=1
  ROOT %k = f32[8,100]{1,0} custom-call(%r, %n), custom_call_target="kernel"
}
"""


def test_a_gpu_waits_for_loops_of_unknown_length_and_moves_of_slices_no_more_than_the_slice() -> None:
    known = GPU_LOOPS.replace("KNOWN", 'backend_config={"known_trip_count":{"n":"5"}}')
    # The fusion reads a slice, a row and its index and writes the slice; the kernel reads and writes whole arrays.
    of_a_pass, of_the_kernel = 3 * 400 + 4, 2 * 3200 + 400
    assert gpu_work(known, passes=7.0) == Work(6, 5 * of_a_pass + of_the_kernel, 0)
    assert gpu_work(GPU_LOOPS, passes=7.0) == Work(8, 7 * of_a_pass + of_the_kernel, 7)


def test_arrays_of_a_shape_count_once_a_body_unless_they_stay_in_fast_memory() -> None:
    hlo = """HloModule jit_f

%body.1 (p.1: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %p.1 = (s32[], f32[8,64]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %x.1 = f32[8,64]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %narrow.1 = bf16[8,64]{1,0:T(8,128)(2,1)} convert(%x.1)
  %near.1 = f32[8,64]{1,0:T(8,128)S(1)} exponential(%narrow.1)
  %other.1 = f32[64,8]{1,0:T(8,128)} transpose(%near.1), dimensions={1,0}
  %space.1 = f32[8,64]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %t.1 = (s32[], f32[8,64]{1,0}) tuple(%i.1, %space.1)
}

ENTRY %main (a: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %a = (s32[], f32[8,64]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[8,64]{1,0}) while(%a), condition=%cond.1, body=%body.1
}
"""
    read, narrow = 4 * 8 * 64, 2 * 8 * 64
    assert loop_traffic(hlo, (8, 64)) == [read + 2 * narrow]
    assert loop_traffic(hlo, (64, 8)) == [read]
