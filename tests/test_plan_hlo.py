"""Reading compiled programs: a hand-written one, and real ones with known costs."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from runs import small_config

from tinymim_jax import optim
from tinymim_jax.experiment import batch_shapes
from tinymim_jax.flops import step_flops
from tinymim_jax.plan.build import plan_experiment
from tinymim_jax.plan.compiled import compile_here
from tinymim_jax.plan.hlo import work_of
from tinymim_jax.plan.roofline import collectives, step_time
from tinymim_jax.plan.topology import parse_topology

pytestmark = pytest.mark.usefixtures("optimized")

TEXT = """HloModule hand_written, is_scheduled=true

%sliced (param_0: f32[24,128], param_1: s32[]) -> f32[1,128] {
  %param_0 = f32[24,128]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %same = f32[24,128]{1,0} bitcast(%param_0)
  ROOT %slice = f32[1,128]{1,0} dynamic-slice(%same, %param_1, %zero), dynamic_slice_sizes={1,128}
}

%body (carry: (s32[], f32[24,128], f32[64,64])) -> (s32[], f32[24,128], f32[64,64]) {
  %carry = (s32[], f32[24,128]{1,0}, f32[64,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %stack = f32[24,128]{1,0} get-tuple-element(%carry), index=1
  %x = f32[64,64]{1,0} get-tuple-element(%carry), index=2
  %one_of_them = f32[1,128]{1,0} fusion(%stack, %i), kind=kLoop, calls=%sliced
  %product = f32[64,64]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %sum = f32[64,64]{1,0} all-reduce(%product), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %next = (s32[], f32[24,128]{1,0}, f32[64,64]{1,0}) tuple(%i, %stack, %sum)
}

%condition (carry.1: (s32[], f32[24,128], f32[64,64])) -> pred[] {
  %carry.1 = (s32[], f32[24,128]{1,0}, f32[64,64]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%carry.1), index=0
  %limit = s32[] constant(24)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[24,128], b: f32[64,64], c: bf16[100,197]) -> f32[64,64] {
  %a = f32[24,128]{1,0} parameter(0)
  %b = f32[64,64]{1,0} parameter(1)
  %c = bf16[100,197]{1,0:T(8,128)(2,1)} parameter(2)
  %start = s32[] constant(0)
  %fast = bf16[100,197]{1,0:T(8,128)(2,1)S(1)} copy(%c)
  %gathered = bf16[800,197]{1,0:T(8,128)(2,1)} all-gather(%c), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %pair = (bf16[100,197]{1,0}, bf16[]) all-reduce(%c, %c), channel_id=3, replica_groups=mesh['x'=2,'y'=4] {'x'}, to_apply=%add
  %state = (s32[], f32[24,128]{1,0}, f32[64,64]{1,0}) tuple(%start, %a, %b)
  %loop = (s32[], f32[24,128]{1,0}, f32[64,64]{1,0}) while(%state), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"24"}}
  ROOT %result = f32[64,64]{1,0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


# Attention of 8 x 6 heads of 64 and 198 tokens, as XLA's CUDA compiler writes it.
CUDNN = """HloModule cudnn

ENTRY %main (q: bf16[8,198,6,64], n: s32[8]) -> bf16[8,6,198,64] {
  %q = bf16[8,198,6,64]{3,2,1,0} parameter(0)
  %n = s32[8]{0} parameter(1)
  %fwd = (bf16[8,6,198,64]{3,1,2,0}, f32[8,6,198]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q, %n, %n), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.125, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["8", "6", "198", "198"], "tuple_shapes": []}}}
  %bwd = (bf16[8,6,198,64]{3,1,2,0}, bf16[8,6,198,64]{3,1,2,0}, bf16[8,6,198,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q, %n, %n), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.125, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["8", "6", "198", "198"], "tuple_shapes": []}}}
  ROOT %out = bf16[8,6,198,64]{3,1,2,0} get-tuple-element(%fwd), index=0
}
"""  # noqa: E501


def test_attention_of_cudnn():
    forward, backward = work_of(CUDNN)
    pairs, features = 8 * 6 * 198**2, 8 * 198 * 384
    assert (forward.flops, backward.flops) == (4 * pairs * 64, 10 * pairs * 64)
    assert forward.bytes == 2 * 4 * features + 4 * 8 * 6 * 198 + 2 * 4 * 8
    assert forward.kernel
    assert backward.kernel
    time = step_time([forward, backward], parse_topology("h100x1"))
    assert (time.kernels, time.kernel_flops, time.kernel_bytes) == (2, time.flops, time.bytes)


def test_a_hand_written_program():
    work = work_of(TEXT)
    assert [(each.times, each.collective, each.group) for each in work] == [
        (1, "", 0),
        (1, "all-gather", 8),
        (1, "all-reduce", 2),
        (24, "", 0),
        (24, "", 0),
        (24, "all-reduce", 4),
    ]
    copy, gather, pair, slices, product, looped = work
    padded = 2 * 104 * 256  # bfloat16, to tiles of 8 x 128
    assert copy.bytes == padded  # the copy lies in fast memory
    assert slices.bytes == 2 * 4 * 128 + 4  # of the stack one row is read, one is written; and the index
    assert product.bytes == 3 * 4 * 64 * 64
    assert product.flops == 2 * 64**3
    assert gather.sent == 8 * 2 * 100 * 197
    assert pair.sent == 2 * 2 * 100 * 197
    assert looped.sent == 4 * 64 * 64


def test_of_stacks_only_the_slices_move():
    """A scan as the TPU compiler writes it: nested fusions slice, one updates in place, a copy prefetches."""
    text = """
%inner (p.0: f32[24,8,128], p.1: s32[]) -> f32[8,128] {
  %p.0 = f32[24,8,128]{2,1,0:T(8,128)} parameter(0)
  %p.1 = s32[]{:T(128)S(6)} parameter(1)
  %one = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p.0, %p.1), dynamic_slice_sizes={1,8,128}
  ROOT %flat = f32[8,128]{1,0:T(8,128)} bitcast(%one)
}

%outer (q.0: f32[24,8,128], q.1: s32[], q.2: f32[24,8,128]) -> f32[24,8,128] {
  %q.0 = f32[24,8,128]{2,1,0:T(8,128)} parameter(0)
  %q.1 = s32[]{:T(128)S(6)} parameter(1)
  %q.2 = f32[24,8,128]{2,1,0:T(8,128)} parameter(2)
  %row = f32[8,128]{1,0:T(8,128)} fusion(%q.0, %q.1), kind=kLoop, calls=%inner
  %new = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%row)
  ROOT %put = f32[24,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%q.2, %new, %q.1)
}

ENTRY %main (a: f32[24,8,128], i: s32[], b: f32[24,8,128]) -> f32[24,8,128] {
  %a = f32[24,8,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %b = f32[24,8,128]{2,1,0:T(8,128)} parameter(2)
  %ahead = ((f32[24,8,128]{2,1,0:T(8,128)}), f32[3,8,128]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:3]}
  %here = f32[3,8,128]{2,1,0:T(8,128)S(1)} slice-done(%ahead)
  ROOT %updated = f32[24,8,128]{2,1,0:T(8,128)} fusion(%a, %i, %b), kind=kLoop, calls=%outer
}
"""  # noqa: E501
    row = 4 * 8 * 128
    assert [each.bytes for each in work_of(text)] == [3 * row, row + row]


@pytest.mark.parametrize("trips", ['backend_config={"known_trip_count":{"n":"24"}}', ""])
def test_trips_come_from_the_condition_where_the_loop_does_not_say(trips):
    text = TEXT.replace('backend_config={"known_trip_count":{"n":"24"}}', trips)
    assert sum(each.times for each in work_of(text) if each.flops) == 24


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        # A linear layer, its weights' gradient, and batched products of attention, as libtpu 0.0.52 writes them.
        (
            "f32[4,50,96]{2,1,0} convolution(f32[4,50,32]{2,1,0} %x, f32[32,96,1]{1,0,2} %w), "
            "window={size=1}, dim_labels=b0f_io0->b0f",
            2 * 4 * 50 * 32 * 96,
        ),
        (
            "f32[96,32,1]{1,0,2} convolution(f32[4,50,96]{2,1,0} %x, f32[4,50,32]{2,1,0} %w), "
            "window={size=50}, dim_labels=f0b_i0o->bf0",
            2 * 4 * 50 * 32 * 96,
        ),
        (
            "f32[4,3,50,50]{3,2,1,0} convolution(f32[4,50,3,8]{3,2,1,0} %x, f32[4,50,3,8]{3,2,1,0} %w), "
            "window={size=4x3 stride=3x2 lhs_dilate=4x3}, dim_labels=0b1f_0o1i->01bf",
            2 * 4 * 3 * 50 * 50 * 8,
        ),
        (
            "f32[4,50,16,8]{3,2,1,0} convolution(f32[4,50,96,1]{3,2,1,0} %x, f32[16,8,96,1]{3,2,1,0} %w), "
            "window={size=1x16 pad=0_0x15_15 rhs_reversal=0x1}, dim_labels=b0f1_1oi0->b01f",
            2 * 4 * 50 * 16 * 8 * 96,
        ),
    ],
)
def test_products_that_are_written_as_convolutions(line, flops):
    result, shapes = line.split(" convolution("), re.findall(r"(f32\S+) %(\w)", line)
    body = "".join(f"  %{name} = {shape} parameter({i})\n" for i, (shape, name) in enumerate(shapes))
    call = "convolution(" + re.sub(r"f32\S+ %", "%", result[1])
    text = f"ENTRY %main (x: f32[1], w: f32[1]) -> f32[1] {{\n{body}  ROOT %y = {result[0]} {call}\n}}\n"
    assert [each.flops for each in work_of(text)] == [flops]


def test_products_that_are_written_as_calls_of_a_library():
    config = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}}'
    text = (
        "ENTRY %main (x: f32[1], w: f32[1]) -> f32[1] {\n"
        "  %x = bf16[6,50,32]{2,1,0} parameter(0)\n  %w = bf16[6,50,32]{2,1,0} parameter(1)\n"
        "  ROOT %y = (f32[6,50,50]{2,1,0}, s8[1024]{0}) custom-call(%x, %w), "
        f'custom_call_target="__cublas$lt$matmul", backend_config={config}\n}}\n'
    )
    assert [each.flops for each in work_of(text)] == [2 * 6 * 50 * 50 * 32]


INT8 = """HloModule int8

%fused (x: bf16[50,32], w: s8[32,16], v: bf16[32,16]) -> s32[50,16] {
  %x = bf16[50,32]{1,0} parameter(0)
  %w = s8[32,16]{1,0} parameter(1)
  %v = bf16[32,16]{1,0} parameter(2)
  %rows = s8[50,32]{1,0} convert(%x)
  %float = bf16[50,16]{1,0} dot(%x, %v), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %whole = s32[50,16]{1,0} convolution(%rows, %w), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[50,32], w: s8[32,16], v: bf16[32,16]) -> s32[50,16] {
  %x = bf16[50,32]{1,0} parameter(0)
  %w = s8[32,16]{1,0} parameter(1)
  %v = bf16[32,16]{1,0} parameter(2)
  ROOT %both = s32[50,16]{1,0} fusion(%x, %w, %v), kind=kOutput, calls=%fused
}
"""


def test_products_of_8_bit_integers_are_told_apart():
    """In one fusion with a product of floats; 8-bit weights are a byte each."""
    (both,) = work_of(INT8)
    assert (both.flops, both.int8) == (2 * 2 * 50 * 32 * 16, 2 * 50 * 32 * 16)
    assert both.bytes == 2 * 50 * 32 + 32 * 16 + 2 * 32 * 16 + 4 * 50 * 16


def test_sums_of_collectives():
    rows = collectives(work_of(TEXT), parse_topology("v5e-8"))
    assert [(row.kind, row.group, row.count) for row in rows] == [
        ("all-reduce", 4, 24),
        ("all-gather", 8, 1),
        ("all-reduce", 2, 1),
    ]
    assert rows[0].bytes == 24 * 4 * 64 * 64


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        work_of("RESOURCE_EXHAUSTED")


def test_a_real_scan_counts_as_often_as_it_runs():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("x"))

    def function(x, weights):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
        return x.sum(axis=0)

    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=rows)
    weights = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32)
    work = work_of(jax.jit(function).lower(x, weights).compile().as_text())
    assert sum(each.times * each.flops for each in work) == 5 * 2 * 8 * 32 * 32
    assert [(row.kind, row.group, row.bytes) for row in collectives(work, parse_topology("cpux8"))] == [
        ("all-reduce", 8, 4 * 32)
    ]


@pytest.mark.parametrize("experiment", ["mae_teacher", "finetune"])
def test_a_real_step_sends_each_gradient_once(experiment, data_dir):
    """Eight data-parallel devices send the float32 gradient of every trained parameter and a few averages."""
    config = small_config(experiment, "train.batch_size=32")
    memory, hlo = compile_here(config, parse_topology("cpux8"), data_dir=data_dir)
    planned = plan_experiment(config, data_dir=data_dir)
    trained, _ = optim.split(planned.params(), planned.paths)
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(trained))
    work = work_of(hlo)
    sent = sum(row.bytes for row in collectives(work, parse_topology("cpux8")) if row.kind == "all-reduce")
    # A learned position of the CLS token has the token's own gradient, which is sent once; metrics come on top.
    assert sent == pytest.approx(gradients, rel=0.01)
    assert not memory["refused"]
    # A device computes an eighth of the FLOPs that the trace has.
    flops = step_flops(planned.experiment.task, planned.frozen, batch_shapes(planned.experiment))
    assert sum(each.times * each.flops for each in work) == pytest.approx(flops / 8, rel=0.02)
