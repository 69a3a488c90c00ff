"""What a user does with an item: click, watch time, flags.

With satisfaction s = σ(utility), duration d and r = d / 30 s:

  click         ~ Bernoulli(s)
  play time     = d · min(1, e^(w + s − ½ + 0.6·ε) · r^−0.4), ε ~ N(0, 1),
                  w = −0.4 after a click, −2 without
  long_view     = play time ≥ min(d, 18 s)
  dislike       ~ Bernoulli(0.05·(1 − s)²)
  other flags   ~ Bernoulli(rate·s²) after a click, never without
  pay           as those, times e^(−price / 40)

So the time watched grows as d^0.6 at equal satisfaction: rewarding play time
alone favours long videos. `long_view` follows the public KuaiRand logs.
INFERRED: all rates; they are of the order of magnitude of those logs.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64
from scipy import special

from onerec_jax.simulation.affinity import sigmoid, slate_utilities
from onerec_jax.simulation.state import State
from onerec_jax.simulation.world import World

RATES = {
  "like": 0.2,
  "follow": 0.04,
  "comment": 0.04,
  "forward": 0.03,
  "collect": 0.05,
  "profile_enter": 0.1,
  "pay": 0.1,
}
"""Probability of a flag after a click, at satisfaction 1."""
DISLIKE_RATE = 0.05
LONG_VIEW_MS = 18_000

_DURATION_POWER = 0.6
_REFERENCE_MS = 30_000
_CLICKED, _PASSED = -0.4, -2.0
_NOISE = 0.6
_PRICE_SCALE = 40.0
NUM_UNIFORMS = 2 + len(RATES)
"""Uniform draws an impression needs, beside one normal draw."""


@dataclasses.dataclass(frozen=True)
class Feedback:
  """Feedback on the slots of requests.

  Attributes:
    satisfaction: the true probability of a click; not in any log.
    click: whether the user clicked.
    play_time: milliseconds, at most the duration.
    flags: name → whether it happened; `click` is not among them.
  """

  satisfaction: Float32[np.ndarray, "B slots"]
  click: Bool[np.ndarray, "B slots"]
  play_time: Int64[np.ndarray, "B slots"]
  flags: dict[str, np.ndarray]


def flag_probability(
  world: World,
  name: str,
  items: Int32[np.ndarray, "..."],
  satisfaction: Float32[np.ndarray, "..."],
) -> Float32[np.ndarray, "..."]:
  """Probability of a flag of `RATES`, given a click."""
  probability = np.float32(RATES[name]) * satisfaction**2
  if name == "pay":
    probability = probability * np.exp(-world.item_price[items] / _PRICE_SCALE)
  return probability


def draw(
  world: World,
  state: State,
  users: Int32[np.ndarray, "B"],
  items: Int32[np.ndarray, "B slots"],
  uniforms: Float32[np.ndarray, "B slots draws"],
  normals: Float32[np.ndarray, "B slots"],
) -> Feedback:
  """Feedback as a pure function of the draws."""
  satisfaction = sigmoid(slate_utilities(world, state, users, items))
  click = uniforms[..., 0] < satisfaction
  duration = world.item_duration[items]
  play_time = _play_time(duration, satisfaction, click, normals)
  dislike = uniforms[..., 1] < DISLIKE_RATE * (1 - satisfaction) ** 2
  flags = {
    "long_view": play_time >= np.minimum(duration, LONG_VIEW_MS),
    "dislike": dislike,
  }
  for index, name in enumerate(RATES, start=2):
    probability = flag_probability(world, name, items, satisfaction)
    flags[name] = click & (uniforms[..., index] < probability)
  return Feedback(satisfaction, click, play_time, flags)


def expected_play_time(
  world: World,
  items: Int32[np.ndarray, "..."],
  satisfaction: Float32[np.ndarray, "..."],
) -> Float32[np.ndarray, "..."]:
  """Mean play time in ms, over clicks and noise; whole ms are not rounded.

  With share = e^(μ + σε) until the whole item is watched,
  E min(1, share) = e^(μ + σ²/2)·Φ(−μ/σ − σ) + Φ(μ/σ).
  """
  duration = world.item_duration[items]
  long = (_DURATION_POWER - 1) * np.log(duration / _REFERENCE_MS)
  total = 0.0
  for will, odds in ((_CLICKED, satisfaction), (_PASSED, 1 - satisfaction)):
    log_share = will + satisfaction - 0.5 + long
    z = log_share / _NOISE
    mean = np.exp(log_share + _NOISE**2 / 2) * special.ndtr(-z - _NOISE)
    total = total + odds * (mean + special.ndtr(z))
  return (duration * total).astype(np.float32)


def long_view_probability(
  world: World,
  items: Int32[np.ndarray, "..."],
  satisfaction: Float32[np.ndarray, "..."],
) -> Float32[np.ndarray, "..."]:
  """Probability of a long view, over clicks and noise.

  P(share ≥ min(1, 18 s / d)) = Φ((μ − log min(1, 18 s / d)) / σ).
  """
  duration = world.item_duration[items]
  long = (_DURATION_POWER - 1) * np.log(duration / _REFERENCE_MS)
  least = np.log(np.minimum(1.0, LONG_VIEW_MS / duration))
  total = 0.0
  for will, odds in ((_CLICKED, satisfaction), (_PASSED, 1 - satisfaction)):
    log_share = will + satisfaction - 0.5 + long
    total = total + odds * special.ndtr((log_share - least) / _NOISE)
  return np.asarray(total, np.float32)


def _play_time(
  duration: np.ndarray,
  satisfaction: np.ndarray,
  click: np.ndarray,
  normals: np.ndarray,
) -> np.ndarray:
  will = np.where(click, np.float32(_CLICKED), np.float32(_PASSED))
  share = np.exp(will + satisfaction - 0.5 + _NOISE * normals)
  share = share * (duration / _REFERENCE_MS) ** (_DURATION_POWER - 1)
  return np.floor(duration * np.minimum(share, 1.0)).astype(np.int64)
