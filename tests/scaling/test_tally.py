"""What a program does: hand-written HLO, and XLA's own counts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.scaling import hlo, tally

# A loop over 3 of 6 layers (counter 2, 4, 6 below 8): each turn slices a
# layer's weight from HBM, gathers it on 4 devices and multiplies.
LOOP = """HloModule jit_f

%sliced (p0: f32[6,8,128], p1: s32[]) -> bf16[1,8,128] {
  %p0 = f32[6,8,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %c0 = s32[]{:T(128)} constant(0)
  %s = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %c0, %c0), dynamic_slice_sizes={1,8,128}
  ROOT %c = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} convert(%s)
}

%product (p0: bf16[16,32], p1: bf16[1,32,128]) -> (bf16[16,128], bf16[16,32]) {
  %p0 = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p1 = bf16[1,32,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %b = bf16[32,128]{1,0:T(8,128)(2,1)} bitcast(%p1)
  %d = bf16[16,128]{1,0:T(8,128)(2,1)} dot(%p0, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (bf16[16,128]{1,0:T(8,128)(2,1)}, bf16[16,32]{1,0:T(8,128)(2,1)S(1)}) tuple(%d, %p0)
}

%body (p: (s32[], f32[6,8,128], bf16[16,32])) -> (s32[], f32[6,8,128], bf16[16,32]) {
  %p = (s32[]{:T(128)}, f32[6,8,128]{2,1,0:T(8,128)}, bf16[16,32]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %w = f32[6,8,128]{2,1,0:T(8,128)} get-tuple-element(%p), index=1
  %x = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=2
  %two = s32[]{:T(128)} constant(2)
  %j = s32[]{:T(128)S(6)} copy(%i)
  %next = s32[]{:T(128)S(6)} add(%j, %two)
  %layer = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} fusion(%w, %i), kind=kLoop, calls=%sliced, backend_config={"window_config":{"estimated_cycles":"100"}}
  %whole = bf16[1,32,128]{2,1,0:T(8,128)(2,1)} all-gather(%layer), channel_id=1, replica_groups=[2,4]<=[8], dimensions={1}, metadata={op_name="f/gather"}
  %y = (bf16[16,128]{1,0:T(8,128)(2,1)}, bf16[16,32]{1,0:T(8,128)(2,1)S(1)}) fusion(%x, %whole), kind=kOutput, calls=%product
  ROOT %out = (s32[]{:T(128)}, f32[6,8,128]{2,1,0:T(8,128)}, bf16[16,32]{1,0:T(8,128)(2,1)S(1)}) tuple(%next, %w, %x)
}

%condition (p: (s32[], f32[6,8,128], bf16[16,32])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[6,8,128]{2,1,0:T(8,128)}, bf16[16,32]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %end = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%i, %end), direction=LT
}

ENTRY %main (w: f32[6,8,128], x: bf16[16,32]) -> bf16[16,32] {
  %w = f32[6,8,128]{2,1,0:T(8,128)} parameter(0)
  %x = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %start = s32[]{:T(128)} constant(2)
  %zero = s32[]{:T(128)} copy(%start)
  %init = (s32[]{:T(128)}, f32[6,8,128]{2,1,0:T(8,128)}, bf16[16,32]{1,0:T(8,128)(2,1)S(1)}) tuple(%zero, %w, %x)
  %loop = (s32[]{:T(128)}, f32[6,8,128]{2,1,0:T(8,128)}, bf16[16,32]{1,0:T(8,128)(2,1)S(1)}) while(%init), condition=%condition, body=%body
  ROOT %r = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


KERNEL = """HloModule jit_f

ENTRY %main (x: f32[16,128]) -> f32[16,128] {
  %x = f32[16,128]{1,0:T(8,128)} parameter(0)
  ROOT %y = f32[16,128]{1,0:T(8,128)} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":{"flops":"123","transcendentals":"7","bytes_accessed":"0"}}}
}
"""  # noqa: E501


def test_a_kernel_is_believed_its_flops_and_moves_its_arrays():
  found = tally.tally(KERNEL)
  assert found.flops == 123
  assert found.bytes == 2 * 16 * 128 * 4


def test_a_loop_counts_as_often_as_it_runs():
  found = tally.tally(LOOP)
  assert found.flops == 3 * 2 * 16 * 128 * 32
  assert found.cycles == 3 * 100
  layer, whole, result = 8 * 128 * 2, 32 * 128 * 2, 16 * 128 * 2
  scalars = 2 * 4 + 4  # the counter's copies; the sum lies on the chip
  # A turn: a float32 slice read, its half-size copy written and read again,
  # the whole written and read, the product written. x lies on the chip.
  turn = 2 * layer + layer + layer + 2 * whole + result + scalars
  # The counter is read by the fusion too, and copied once outside.
  assert found.bytes == 3 * turn + 2 * 4
  (gather,) = found.collectives
  assert (gather.kind, gather.size, gather.times) == ("all-gather", whole, 3)
  assert gather.op_name == "f/gather"
  np.testing.assert_array_equal(gather.groups, [[0, 1, 2, 3], [4, 5, 6, 7]])


@pytest.mark.parametrize(
  ("old", "new"),
  [
    ("direction=LT", "direction=NE"),
    ("%end = s32[]{:T(128)} constant(8)", "%end = s32[]{:T(128)} negate(%i)"),
    ("add(%j, %two)", "multiply(%j, %two)"),
  ],
)
def test_a_loop_of_unknown_length_is_refused(old, new):
  assert old in LOOP
  with pytest.raises(ValueError, match="cannot read how often loop loop runs"):
    tally.tally(LOOP.replace(old, new))


def entry(*lines):
  body = "\n".join(f"  {line}" for line in lines)
  return f"ENTRY %main () -> f32[] {{\n{body}\n}}\n"


def test_an_asynchronous_collective_is_one():
  """A gather that three fusions share, and a pair of start and done."""
  fused = "\n".join(
    f"""%part.{n} (p: bf16[8,128]) -> bf16[32,128] {{
  %p = bf16[8,128]{{1,0}} parameter(0)
  ROOT %g.{n} = bf16[32,128]{{1,0}} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={{0}}
}}
"""  # noqa: E501
    for n in range(3)
  )
  lines = ["%a = bf16[8,128]{1,0} parameter(0)"] + [
    f"%f.{n} = bf16[32,128]{{1,0}} fusion(%a), kind=kCustom, calls=%part.{n}"
    for n in range(3)
  ]
  lines += [
    "%s = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[], u32[]) "
    "collective-permute-start(%a), channel_id=8, "
    "source_target_pairs={{0,1},{1,0}}",
    "ROOT %d = bf16[8,128]{1,0} collective-permute-done(%s)",
  ]
  found = tally.tally(fused + entry(*lines))
  assert [(c.kind, c.size) for c in found.collectives] == [
    ("all-gather", 32 * 128 * 2),
    ("collective-permute", 8 * 128 * 2),
  ]
  piece, whole = 8 * 128 * 2, 32 * 128 * 2
  assert found.bytes == piece + whole + 2 * piece


def test_updates_and_gathers_count_what_they_touch():
  text = entry(
    "%table = f32[1000,128]{1,0} parameter(0)",
    "%ids = s32[4]{0} parameter(1)",
    "%row = f32[1,128]{1,0} parameter(2)",
    "%i = s32[]{:S(6)} parameter(3)",
    "%rows = f32[4,128]{1,0} gather(%table, %ids), offset_dims={1}",
    "ROOT %u = f32[1000,128]{1,0} dynamic-update-slice(%table, %row, %i, %i)",
  )
  assert tally.tally(text).bytes == 2 * 4 * 128 * 4 + 2 * 128 * 4


def test_copies_to_the_chip_cross_once():
  text = entry(
    "%a = f32[8,128]{1,0} parameter(0)",
    "%s = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%a)",
    "%b = f32[8,128]{1,0:S(1)} copy-done(%s)",
    "ROOT %c = f32[8,128]{1,0:S(1)} negate(%b)",
  )
  assert tally.tally(text).bytes == 8 * 128 * 4


def product(line, *operands):
  lines = [f"%o{i} = {s} parameter({i})" for i, s in enumerate(operands)]
  computations, name = hlo.parse(entry(*lines, f"ROOT %p = {line}"))
  body = computations[name]
  return hlo.product_flops(body, body["p"])


def test_a_batched_product_written_as_a_dilated_convolution():
  """[4, 8] products of 15 × 64 with 64 × 512, as the TPU compiler has them."""
  found = product(
    "bf16[4,8,15,512]{3,2,1,0} convolution(%o0, %o1), window={size=4x8 "
    "stride=3x7 lhs_dilate=4x8}, dim_labels=01bf_01io->01bf",
    "bf16[4,8,15,64]{3,2,1,0}",
    "bf16[4,8,64,512]{3,2,1,0}",
  )
  assert found == 2 * 4 * 8 * 15 * 64 * 512


@pytest.mark.parametrize(
  "options",
  [
    {"window_strides": (1, 1), "padding": "SAME"},
    {"window_strides": (2, 3), "padding": ((1, 2), (0, 3))},
    {"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 1)},
    {
      "window_strides": (1, 2),
      "padding": ((2, 2), (2, 2)),
      "lhs_dilation": (2, 3),
    },
  ],
)
def test_convolutions_agree_with_a_loop_over_places(options):
  """An input, an output and a weight for every multiply-add, one by one."""
  image, kernel = jnp.ones((1, 1, 7, 9)), jnp.ones((1, 1, 3, 4))

  def convolve(image, kernel):
    return jax.lax.conv_general_dilated(image, kernel, **options)

  text = jax.jit(convolve).lower(image, kernel).as_text(dialect="hlo")
  # With ones everywhere an output is how many products it adds up.
  expected = 2 * float(convolve(image, kernel).sum())
  computations, name = hlo.parse(re.sub(r"(?<=[ (])(\w+\.\d+)", r"%\1", text))
  (found,) = (
    hlo.product_flops(body, i)
    for body in computations.values()
    for i in body.values()
    if i.opcode == "convolution"
  )
  assert name
  assert found == expected


def test_a_scan_agrees_with_the_same_program_unrolled():
  """XLA's own count of the unrolled program is the oracle."""
  weights, x = jnp.ones((5, 64, 64)), jnp.ones((32, 64))

  def run(weights, x, unroll):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, weights, unroll=unroll)

  compiled = [
    jax.jit(run, static_argnums=2).lower(weights, x, n).compile()
    for n in (1, 5)
  ]
  unrolled = compiled[1].cost_analysis()["flops"]
  assert unrolled == pytest.approx(5 * 2 * 32 * 64 * 64, rel=0.01)
  assert compiled[0].cost_analysis()["flops"] < 0.3 * unrolled
  for program in compiled:
    found = tally.tally(program.as_text()).flops
    assert found == 5 * 2 * 32 * 64 * 64
