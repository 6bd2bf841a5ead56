"""Checkpoints that survive kills, full disks and damaged files."""

import contextlib
import functools
import gc
import itertools
import json
import logging as std_logging
import os
import re
import sys
import time
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from adaptax.experiments.fingerprint import by_path, fingerprint

_ORBAX = os.path.dirname(ocp.__file__)


class CheckpointError(OSError):
  """A checkpoint could not be written, or none could be read."""


class MismatchError(ValueError):
  """A good checkpoint holds other leaves than the run asks for."""


class _DamageError(Exception):
  """A checkpoint does not read back as it was written."""


class Checkpoints:
  """The checkpoints of one run, written in the background by Orbax.

  A save appears under `directory/<step>` in one rename, so that a process
  killed at any moment leaves the old checkpoint or the new one. What a killed
  save left is removed when the directory is opened, hence only one run may
  have it open.

  Every checkpoint carries the fingerprint of its leaves. One that does not
  read back as it was written is moved to `damaged-<step>`, and the one before
  it serves. Where none is left, the run does not start over by itself.

  With several processes, every process calls every method with the same
  arguments, the directory is shared, and leaves are global arrays; process 0
  renames. Damage that only some processes run into (one reads a bad chunk,
  the others do not) ends the run by Orbax's time-out instead of falling back;
  what every process sees (a missing file, the fingerprint) falls back.

  Args:
    directory: made if it does not exist.
    every: number of steps between two saves that are due.
    keep: number of newest checkpoints that are kept.
  """

  def __init__(self, directory, *, every: int, keep: int):
    for name, value in (("every", every), ("keep", keep)):
      if value < 1:
        raise ValueError(f"checkpoints need {name} >= 1, not {value}")
    _quieten()
    self._every = every
    self._manager = ocp.CheckpointManager(
      epath.Path(directory).resolve(),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        cleanup_tmp_directories=True,
        lightweight_initialize=True,
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, trace) -> None:
    try:
      self.close()
    except CheckpointError as problem:
      if error is None:
        raise
      if not isinstance(error, CheckpointError):
        logging.warning("%s", problem)

  def due(self, step: int) -> bool:
    return step % self._every == 0

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """Saves unless `step` is there already; `due` is for the caller to ask.

    Returns as soon as the state is safe from donation; files are written in
    the background.

    Args:
      step: no step that is there is newer.
      state: pytree of arrays.
      meta: whatever else a resume needs, as JSON.

    Raises:
      CheckpointError: the save before this one failed, or this one did.
    """
    latest = self.latest_step()
    if step == latest:
      return
    if latest is not None and step < latest:
      raise ValueError(
        f"cannot save step {step} into {self._manager.directory}: step"
        f" {latest} is there; restore it first or use another directory"
      )
    leaves = by_path(state)
    record = _seal(
      {
        "meta": meta,
        "leaves": {path: _kind(leaf) for path, leaf in leaves.items()},
        "fingerprint": fingerprint(state),
      }
    )
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave(record)
    )
    try:
      self._manager.save(step, args=args, force=True)
    except Exception as error:
      raise self._failure("save a checkpoint", error) from error

  def restore(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """Reads the newest good checkpoint: (step, state, meta), None without one.

    Args:
      abstract: the state as a pytree of ShapeDtypeStruct with shardings,
        which may be others than those of the run that saved it.

    Raises:
      MismatchError: the newest checkpoint holds other leaves.
      CheckpointError: there were checkpoints, but all are damaged; or the
        machine, not a file, is why the newest cannot be read.
    """
    while (step := self.latest_step()) is not None:
      try:
        return step, *self._read(step, abstract)
      except _DamageError as error:
        self._set_aside(step, error)
    root = self._manager.directory
    if damaged := sorted(path.name for path in root.glob("damaged-*")):
      raise CheckpointError(
        f"no checkpoint in {root} reads back (set aside: {', '.join(damaged)});"
        " remove what is set aside to start over"
      )
    return None

  def close(self) -> None:
    """Waits for the save that is being written; CheckpointError if it fails."""
    try:
      try:
        self._manager.wait_until_finished()
      finally:
        self._manager.close()
    except Exception as error:
      raise self._failure("save a checkpoint", error) from error

  def _read(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
    record = _unseal(self._fetch(step, meta=ocp.args.JsonRestore()).meta)
    wanted = by_path(abstract)
    here = {path: _kind(leaf) for path, leaf in wanted.items()}
    if differing := _differing(record["leaves"], here):
      path, count = differing[0], len(differing)
      raise MismatchError(
        f"checkpoint {step} in {self._manager.directory} is of another model"
        f" or optimizer: {path} is {record['leaves'].get(path, 'absent')}"
        f" there, {here.get(path, 'absent')} here"
        + (f" ({count - 1} more differ)" if count > 1 else "")
      )
    for leaf in wanted.values():
      leaf.sharding.shard_shape(leaf.shape)  # A bad sharding is no damage.
    leaves = self._fetch(step, state=ocp.args.StandardRestore(wanted)).state
    state = jax.tree.unflatten(
      jax.tree.structure(abstract), [leaves[path] for path in wanted]
    )
    if bad := _differing(record["fingerprint"], fingerprint(state)):
      raise _DamageError(f"{bad[0]} does not match its fingerprint")
    return state, record["meta"]

  def _fetch(self, step: int, **items) -> Any:
    with _muted_coroutines():
      try:
        return self._manager.restore(step, args=ocp.args.Composite(**items))
      except Exception as error:
        problem: Exception = self._failure(f"read checkpoint {step}", error)
        if _is_damage(error):
          problem = _DamageError(_one_line(error))
      time.sleep(0.2)
      gc.collect()
    raise problem

  def _set_aside(self, step: int, error: Exception) -> None:
    root, primary = self._manager.directory, jax.process_index() == 0
    if primary:
      target = root / f"damaged-{step}"
      for count in itertools.count(2):
        if not target.exists():
          break
        target = root / f"damaged-{step}-{count}"
      (root / str(step)).rename(target)
    multihost_utils.sync_global_devices(f"adaptax damaged checkpoint {step}")
    self._manager.reload()
    if primary:
      older = self.latest_step()
      logging.warning(
        "checkpoint %d is damaged (%s): moved to %s, %s",
        step,
        error,
        target,
        "and no other is left" if older is None else f"going back to {older}",
      )

  def _failure(self, deed: str, error: Exception) -> CheckpointError:
    return CheckpointError(
      f"cannot {deed} in {self._manager.directory}: {_one_line(error)}"
    )


@functools.cache
def _quieten() -> None:
  """Leaves an Orbax failure to the one line that we raise or log for it.

  TensorStore threads, whose reads and writes Orbax abandons when one of them
  fails, find its event loop closed and say so each.
  """
  logging.get_absl_logger().addFilter(_is_not_of_orbax)
  hook, noise = sys.unraisablehook, "Event loop is closed"
  sys.unraisablehook = lambda u: str(u.exc_value) == noise or hook(u)


def _is_not_of_orbax(record: std_logging.LogRecord) -> bool:
  """Passes what Orbax logs at --verbosity=1 only."""
  return logging.vlog_is_on(1) or not record.pathname.startswith(_ORBAX)


@contextlib.contextmanager
def _muted_coroutines():
  """For a failed restore, whose abandoned coroutines complain when collected.

  That has to happen in here.
  """
  hook, log = sys.unraisablehook, std_logging.getLogger("asyncio")
  sys.unraisablehook, log.disabled = lambda _: None, True
  try:
    with warnings.catch_warnings(action="ignore"):
      yield
  finally:
    sys.unraisablehook, log.disabled = hook, False


def _is_damage(error: Exception) -> bool:
  """Whether the files are bad, and not the machine that reads them."""
  if isinstance(error, FileNotFoundError):
    return True
  machine = (OSError, MemoryError, jax.errors.JaxRuntimeError)
  # All that TensorStore raises is a ValueError.
  return not isinstance(error, machine) and "os_error_code=" not in str(error)


def _kind(leaf) -> str:
  return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _differing(there: Mapping, here: Mapping) -> list[str]:
  paths = {**here, **there}
  return [path for path in paths if there.get(path) != here.get(path)]


def _checksum(record) -> int:
  return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _seal(record: dict[str, Any]) -> dict[str, Any]:
  record = json.loads(json.dumps(record))
  return {**record, "crc32": _checksum(record)}


def _unseal(record: dict[str, Any]) -> dict[str, Any]:
  if record.pop("crc32", None) != _checksum(record):
    raise _DamageError("the metadata do not match their checksum")
  return record


def _one_line(error: BaseException) -> str:
  """What an Orbax error says at its end, where TensorStore names the reason."""
  text = " ".join(str(error.__cause__ or error).split())
  text = re.sub(r" \[(tensorstore_spec|source locations).*", "", text)
  cut = text.find(": ", len(text) - 160) if len(text) > 160 else -2
  return f"{type(error).__name__}: {text[cut + 2 :]}"
