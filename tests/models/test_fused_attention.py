"""The kernel, interpreted, against the plain attention of attention.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax import partitioning
from onerec_jax.models import attention, fused_attention
from tests import tiny


def inputs(B=4, T=3, L=3, H=4, G=2, S=24, Z=64, tied=True, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  keys = normal(B, S, G, Z)
  values = keys if tied else normal(B, S, G, Z)
  bias = normal(B, H, T, S)
  hidden = rng.random((B, 1, T, S)) < 0.3
  # A padding target sees nothing at all.
  hidden[:, :, -1] = True
  bias = jnp.where(hidden, attention.MASKED, bias)
  return normal(B, T, L, H, Z), keys, values, bias


def gradients(attend, queries, keys, values, bias):
  weight = jnp.cos(jnp.arange(queries.size).reshape(queries.shape))

  def loss(queries, keys, values, bias):
    values = keys if values is None else values
    return jnp.sum(weight * attend(queries, keys, values, bias))

  values = None if values is keys else values
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(
    queries, keys, values, bias
  )


SHAPES = {
  "grouped": dict(),
  "one key head": dict(H=4, G=1),
  "a key head each": dict(H=4, G=4),
  "three heads of 64": dict(H=3, G=3),
  "wide heads": dict(H=2, G=2, Z=128),
  "narrow heads": dict(H=4, G=4, Z=8),
  "own values": dict(tied=False),
  "self-attention": dict(T=24, L=1, H=2, G=2, tied=False),
  "odd rows": dict(B=3, T=5, H=6, G=2),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_plain_attention(shape):
  arrays = inputs(**shape)
  want, want_gradients = gradients(attention.cross_attention, *arrays)
  got, got_gradients = gradients(fused_attention.cross_attention, *arrays)
  np.testing.assert_allclose(got, want, rtol=2e-5)
  for ours, theirs in zip(
    jax.tree.leaves(got_gradients), jax.tree.leaves(want_gradients)
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_kernel_is_what_runs():
  """And scores are in no array of the program around it."""
  arrays = inputs()
  text = str(jax.make_jaxpr(fused_attention.cross_attention)(*arrays))
  assert "pallas_call" in text


@pytest.mark.parametrize("bias_of", ["every target", "one for all"])
def test_what_does_not_fit_is_computed_plainly(bias_of):
  queries, keys, values, bias = inputs()
  if bias_of == "one for all":
    bias = bias[:, :, :1]
  else:
    # Scores of 600 targets over 4,000 positions do not fit the chip.
    queries, keys, values, bias = (
      jax.ShapeDtypeStruct(shape, jnp.float32)
      for shape in (
        (1, 600, 3, 4, 64), (1, 4000, 2, 64), (1, 4000, 2, 64),
        (1, 4, 600, 4000),
      )
    )  # fmt: skip
  attend = fused_attention.cross_attention
  text = str(jax.make_jaxpr(attend)(queries, keys, values, bias))
  assert "pallas_call" not in text


def test_on_a_mesh_each_device_has_its_own():
  mesh = partitioning.make_mesh(config_lib.MeshConfig(data=2, fsdp=2, tensor=2))
  queries, keys, values, bias = inputs(B=8)
  want = attention.cross_attention(queries, keys, values, bias)
  with jax.set_mesh(mesh):
    jitted = jax.jit(fused_attention.cross_attention)
    compiled = jitted.lower(queries, keys, values, bias).compile()
    got = compiled(queries, keys, values, bias)
  np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
  "make", [tiny.lazy_decoder, tiny.encoder_decoder, tiny.decoder_only]
)
def test_a_model_is_the_same_with_the_kernel(make):
  batch, catalogue = tiny.batch(), tiny.catalogue()
  plain, fused = make(), make(attention="fused")
  params = tiny.params(plain)

  def loss(params, model):
    logits = model.apply({"params": params}, batch, catalogue)
    return sum(jnp.mean(jax.nn.logsumexp(x, axis=-1)) for x in logits)

  both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
  want, want_gradients = both(params, plain)
  got, got_gradients = both(params, fused)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  for ours, theirs in zip(
    jax.tree.leaves(got_gradients), jax.tree.leaves(want_gradients)
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)
