"""The training loop.

Restore precedence: the run's own latest checkpoint, else from scratch.
Do not change the order within a step: step → log → validate → checkpoint;
the checkpoint holds the iterator at the batch that comes next.
"""

import dataclasses
import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from onerec_jax import checkpoint, files, partitioning
from onerec_jax import config as config_lib
from onerec_jax.data.batch import Catalogue
from onerec_jax.models import registry
from onerec_jax.training import losses, optimizer, state, step, task, throughput
from onerec_jax.training.metrics_writer import MetricsWriter

PREEMPTED = 75
"""Exit status after a preemption: try again later (sysexits.h)."""

_TRACE_FROM = 10
"""Step of this start that training.profile_steps counts from."""

Validate = Callable[[Any], dict[str, float]]


@dataclasses.dataclass
class Progress:
  """The loop's own memory, saved with each checkpoint."""

  best: float = -np.inf
  best_step: int = 0
  worse: int = 0
  """Validations since the best one."""
  seconds: float = 0.0
  """Time in training steps, over all restarts."""
  start: float | None = None
  """With a gate (training/task.py): what the run's first parameters score."""
  stopped: str = ""
  """With a gate: why it stopped the run."""


@dataclasses.dataclass
class Window:
  """What happened since the last log line."""

  sums: list[losses.Sums] = dataclasses.field(default_factory=list)
  seconds: float = 0.0


def num_steps(settings: config_lib.TrainingConfig, steps_per_epoch: int) -> int:
  """Steps of a whole run."""
  epochs = round(settings.num_epochs * steps_per_epoch)
  return settings.num_steps or max(1, epochs)


def put_batch(batch: Any, sharding: Any) -> Any:
  """This process's rows → its part of the global batch on device."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def train(
  config: config_lib.Config,
  run: files.PathLike,
  model: registry.Model,
  dataset: grain.IterDataset,
  steps_per_epoch: int,
  catalogue: Catalogue,
  index: Any,
  validate: Validate,
  mesh: Mesh,
  work: task.Task | None = None,
) -> Progress:
  """Trains, validating and saving as it goes; resumes where it was.

  Args:
    config: the experiment.
    run: directory of the run.
    model: what to train.
    dataset: endless; of each batch the rows that this process's devices hold.
    steps_per_epoch: of the dataset.
    catalogue: item tables; numpy or device arrays.
    index: prefix index (a pytree) or None; whatever else the steps read.
    validate: params → metrics; its `config.evaluation.select` picks the best.
    mesh: the mesh.
    work: what a step does; default: supervised training.

  Returns:
    The best validation and where it was.

  Raises:
    FloatingPointError: a loss or gradient was not finite and training.on_nan
      is `error`.
    ValueError: with a gate, the start's figure is not finite.
    SystemExit: with status 75 after SIGTERM, once the state is saved.
    KeyboardInterrupt: after Ctrl-C, likewise; at once after a second one.
  """
  run = pathlib.Path(run)
  # Before a mesh is in force: this measures one device.
  hardware = throughput.hardware()
  iterator = iter(dataset)
  example = put_batch(next(iter(dataset)), partitioning.batch_sharding(mesh))
  catalogue, index = jax.device_put(
    (catalogue, index), partitioning.replicated(mesh)
  )
  with (
    jax.set_mesh(mesh),
    checkpoint.TrainingCheckpoints(
      run / "checkpoints", config.training.keep_checkpoints
    ) as checkpoints,
  ):
    loop = _Loop(
      config, run, work or task.Task(config, model), mesh, checkpoints,
      iterator, validate, steps_per_epoch, hardware,
    )  # fmt: skip
    train_state, shapes = loop.begin(example, catalogue)
    step_fn = loop.compile(shapes, catalogue, index)
    return loop.run(train_state, step_fn, catalogue, index)


class _Loop:
  """The mutable part of a run: clock, window, preemption flag."""

  def __init__(
    self, config, run, work, mesh, checkpoints, iterator, validate,
    steps_per_epoch, hardware,
  ):  # fmt: skip
    self.config, self._run, self._mesh = config, run, mesh
    self._task, self._validate = work, validate
    self._checkpoints, self._iterator = checkpoints, iterator
    settings = config.training
    self._steps_per_epoch = steps_per_epoch
    self._num_steps = num_steps(settings, steps_per_epoch)
    self._validate_every = settings.validate_every or steps_per_epoch
    self._save_every = settings.checkpoint_every or self._validate_every
    length = registry.block_parameters(work.model), self._num_steps
    self._schedule = optimizer.make_schedule(config.optimizer, *length)
    self._tx = optimizer.make_optimizer(
      config.optimizer,
      self._schedule,
      optimizer.make_table_schedule(config.optimizer, *length),
    )
    self._step_flops = work.flops()
    self._peak, self._matmul = hardware
    self._preempted = self._interrupted = self._tracing = False
    self._progress, self._window = Progress(), Window()

  def begin(self, example, catalogue):
    """The state to start from, restored or fresh, and its shapes."""
    shapes, make = self._task.plan(self._tx, example, catalogue, self._mesh)
    self._start = self._checkpoints.latest_step or 0
    if self._start:
      # The format first: a newer one may well not restore either.
      metadata = self._checkpoints.metadata(self._start)
      self._progress = Progress(**metadata["progress"])
      train_state = self._checkpoints.restore(
        self._start, shapes, self._iterator
      )
    else:
      train_state = make()
    # What a run killed before its first checkpoint wrote goes, step 0 too.
    self.writer = MetricsWriter(self._run, self._start or -1)
    parameters = state.num_parameters(train_state.params)
    self.writer.say(
      f"{self.config.name}: {parameters:,} parameters, {self._num_steps} steps "
      f"({self._num_steps / self._steps_per_epoch:.1f} epochs) on "
      f"{self._mesh.devices.size} × {jax.devices()[0].device_kind}"
      + (f", resumed at step {self._start}" if self._start else "")
    )
    return train_state, shapes

  def compile(self, shapes, catalogue, index) -> step.StepFn:
    """The step, to be compiled for its first batch."""
    return step.compile_step(
      self._task.step(self._tx), state.shardings(shapes), self._mesh,
      catalogue, index,
    )  # fmt: skip

  def run(self, train_state, step_fn, catalogue, index) -> Progress:
    """Steps to the end."""
    if self._stopped_early():  # and was cut off before it could say so
      return self._progress
    several = jax.process_count() > 1
    if not several:
      # With several, JAX's coordination service listens for the signal.
      previous = {
        one: signal.signal(one, self._stop_soon)
        for one in (signal.SIGTERM, signal.SIGINT)
        if signal.getsignal(one) is not signal.SIG_IGN  # as under nohup
      }
    start, sharding = self._start, partitioning.batch_sharding(self._mesh)
    try:
      if self._task.gate is not None and not start:
        self._validated(0, train_state)
      for done in range(start + 1, self._num_steps + 1):
        self._profile(done - start, train_state)
        clock = time.perf_counter()
        with jax.profiler.StepTraceAnnotation("train", step_num=done):
          batch = put_batch(next(self._iterator), sharding)
          if done == start + 1:
            # Its time is reported, and no part of the steps'.
            self.writer.say("compiling the step ...")
            clock = time.perf_counter()
            step_fn = step_fn.lower(
              train_state, batch, catalogue, index
            ).compile()
            took = time.perf_counter() - clock
            self.writer.say(f"compiled in {took:.1f} s")
            clock = time.perf_counter()
          with jax.transfer_guard("disallow"):
            train_state, sums = step_fn(train_state, batch, catalogue, index)
        self._window.sums.append(sums)
        if several:
          self._preempted = multihost_utils.reached_preemption_sync_point(done)
        last = done == self._num_steps
        validates = last or done % self._validate_every == 0
        saves = validates or done % self._save_every == 0 or self._preempted
        # A checkpoint ends a window too: what a resumed run then logs is what
        # an undisturbed one does.
        logs = saves or done % self.config.training.log_every == 0
        # Fetching waits for the device, so that the window's clock is true.
        fetched = jax.device_get(self._window.sums) if logs else None
        self._window.seconds += time.perf_counter() - clock
        if fetched:
          self._log(done, fetched)
        if validates:
          self._validated(done, train_state)
        if saves:
          self._save(done, train_state)
        if validates and self._stopped_early():
          break
        if self._preempted and saves and not last:
          self._checkpoints.wait()
          self.writer.say(f"stopped: saved step {done}, run again to resume")
          if self._interrupted:
            raise KeyboardInterrupt
          raise SystemExit(PREEMPTED)
      self._checkpoints.wait()
    finally:
      if not several:
        for one, handler in previous.items():
          signal.signal(one, handler)
      self._end_profile()  # a run may be shorter than its window
      self.writer.close()
    return self._progress

  def _stop_soon(self, signum, frame):
    del frame
    self._preempted = True
    if signum == signal.SIGINT:
      self._interrupted = True
      self.writer.say("stopping after this step; Ctrl-C again stops at once")
      signal.signal(signal.SIGINT, signal.default_int_handler)

  def _save(self, done, train_state):
    metadata = {"progress": dataclasses.asdict(self._progress)}
    self._checkpoints.save(done, train_state, self._iterator, metadata)

  def _log(self, done, fetched):
    window, self._window = self._window, Window()
    self._progress.seconds += window.seconds
    totals = {
      name: float(np.sum([sums[name] for sums in fetched]))
      for name in fetched[0]
    }
    nonfinite, count = totals.pop("nonfinite"), totals.pop("count")
    of_steps = {
      name: totals.pop(name) / len(fetched)
      for name in ("grad_norm", "max_expert_load")
      if name in totals
    }
    # A window may hold no target with a weight (pipeline.imitate).
    count = count or float("nan")
    values = {name: total / count for name, total in totals.items()} | of_steps
    rate = len(fetched) / window.seconds
    targets = float(np.sum([sums["count"] for sums in fetched]))
    flops = self._step_flops * rate
    values |= {
      "nonfinite": nonfinite,
      "learning_rate": float(self._schedule(done)),
      "epoch": done / self._steps_per_epoch,
      "targets_per_s": targets / window.seconds,
      "step_ms": 1e3 / rate,
      "gflops_per_s": flops / 1e9,
      "train_s": self._progress.seconds,
    }
    if self._peak:
      values["mfu"] = flops / (self._peak * self._mesh.devices.size)
      hardware = f"MFU {values['mfu']:.1%}"
    else:
      values["matmul_gflops_per_s"] = self._matmul / 1e9
      hardware = f"(a matmul: {self._matmul / 1e9:.0f})"
    self.writer.write(done, "train", values)
    self.writer.say(
      f"step {done:>6}/{self._num_steps}  epoch {values['epoch']:6.2f}  loss "
      f"{values['loss']:.4f}  {values['targets_per_s']:>8,.0f} targets/s  "
      f"{values['step_ms']:.1f} ms/step  {flops / 1e9:.1f} GFLOP/s {hardware}"
    )
    if nonfinite and self.config.training.on_nan == "error":
      raise FloatingPointError(
        f"{nonfinite:.0f} of the last {len(fetched)} updates up to step {done} "
        "had a loss or gradient that is not finite and were left out; lower "
        "optimizer.learning_rate, or set training.on_nan=skip to go on"
      )

  def _stopped_early(self) -> bool:
    progress = self._progress
    impatient = 0 < self.config.training.patience <= progress.worse
    return impatient or bool(progress.stopped)

  def _validated(self, done, train_state) -> None:
    """Validates and keeps the best parameters, or with a gate the latest."""
    metrics = self._validate(train_state.params)
    self.writer.write(done, "validation", metrics)
    select = self.config.evaluation.select
    if select not in metrics:
      raise ValueError(
        f"evaluation.select={select!r} is none of {sorted(metrics)}"
      )
    progress, value = self._progress, metrics[select]
    if self._task.gate is None:
      better = value > progress.best
    else:
      better = self._passes_gate(done, value)
    kept = "best so far" if self._task.gate is None else "kept"
    if better:
      progress.best, progress.best_step = value, done
      progress.worse = 0
      checkpoint.save_best(self._run, done, train_state.params)
    else:
      progress.worse += 1
    self.writer.say(
      f"step {done:>6}/{self._num_steps}  validation {select} {value:.4f}"
      + (f" ({kept})" if better else "")
    )
    if progress.stopped:
      self.writer.say(f"stopped: {progress.stopped}")

  def _passes_gate(self, done, value) -> bool:
    """Whether the run may go on; if not, says why in its progress."""
    progress, gate = self._progress, self._task.gate
    if done == 0:
      if not np.isfinite(value):
        raise ValueError(
          f"evaluation.select={self.config.evaluation.select!r} is {value} for "
          "the start, so the gate has nothing to hold the run against: choose "
          "another figure, or mend the start or the validation split"
        )
      if value == 0 and gate < 1:
        raise ValueError(
          f"evaluation.select={self.config.evaluation.select!r} is 0 for the "
          "start, of which the gate would let a run keep any share: ask more "
          "users (evaluation.validation_users), choose another figure, train "
          "the start for longer, or do without a gate (alignment.gate=1)"
        )
      progress.start = value
    least = progress.start - gate * abs(progress.start)
    if value >= least:
      return True
    progress.stopped = (
      f"{self.config.evaluation.select} {value:.4f} at step {done} is below "
      f"{least:.4f}, {gate:.0%} under the start's {progress.start:.4f}; the "
      f"parameters of step {progress.best_step} stay"
    )
    return False

  def _profile(self, step_of_run, train_state):
    """Opens and closes the trace where its steps begin and end."""
    steps = self.config.training.profile_steps
    if not steps or step_of_run not in (_TRACE_FROM, _TRACE_FROM + steps):
      return
    # Steps run behind their calls; the trace is to hold its own, and all of it.
    jax.block_until_ready(train_state)
    if step_of_run == _TRACE_FROM:
      jax.profiler.start_trace(str(self._run / "profile"))
      self._tracing = True
    else:
      self._end_profile()

  def _end_profile(self):
    if self._tracing:
      jax.profiler.stop_trace()
    self._tracing = False
