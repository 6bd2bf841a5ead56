"""Checkpoints through kills, damaged files, full disks and other devices.

The worker processes of the tests are this file run as a script.
"""

import errno
import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adaptax.experiments.checkpoints import (
  CheckpointError,
  Checkpoints,
  MismatchError,
)


class Moments(NamedTuple):
  mean: jax.Array
  count: jax.Array


def _mesh(count=None):
  return Mesh(np.array(jax.devices()[:count]), ("x",))


def _state(step, mesh, axis=0):
  """A small state that every step changes in every leaf."""
  rng = np.random.default_rng(step)
  spec = P(*[None] * axis, "x")
  split, whole = NamedSharding(mesh, spec), NamedSharding(mesh, P())
  mean = rng.normal(size=(16, 8)).astype(jnp.bfloat16)
  return {
    "weights": jax.device_put(np.float32(rng.normal(size=(16, 24))), split),
    "optimizer": Moments(
      jax.device_put(mean, split), jax.device_put(np.int32(step), whole)
    ),
  }


def _abstract(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def _raw(tree):
  """The bytes of each leaf, so that NaNs and signed zeros are told apart."""
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def _assert_is_step(found, step, mesh):
  assert found is not None
  assert (found[0], found[2]) == (step, {"position": step})
  wanted = _state(step, mesh)
  assert jax.tree.structure(found[1]) == jax.tree.structure(wanted)
  assert _raw(found[1]) == _raw(wanted)


def _save_steps(folder, *steps, keep=3):
  with Checkpoints(folder, every=10, keep=keep) as store:
    for step in steps:
      store.save(step, _state(step, _mesh()), {"position": step})


def _restore(folder):
  with Checkpoints(folder, every=10, keep=3) as store:
    return store.restore(_abstract(_state(0, _mesh())))


def _names(folder):
  return sorted(path.name for path in folder.iterdir())


def _worker(command, *arguments, devices=8, **kwargs):
  """Starts this file as a script in a process of its own."""
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
  return subprocess.Popen(
    [sys.executable, __file__, command, *map(str, arguments)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=env,
    **kwargs,
  )


def _finish(process):
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  return out, err


class TestRoundTrip:
  def test_every_dtype_comes_back_bit_for_bit(self, tmp_path):
    special = np.array(
      [np.nan, -np.nan, -0.0, np.inf, 1e-42, 3.4e38], np.float32
    )
    special = np.append(special, np.uint32(0x7FC12345).view(np.float32))
    state = {
      "f32": jnp.array(special),
      "bf16": jnp.array(special, jnp.bfloat16),
      "f16": jnp.array([1.5, -0.0], jnp.float16),
      "f8": jnp.array([1.5, -0.0], jnp.float8_e4m3fn),
      "i32": jnp.array([-(2**31), 2**31 - 1], jnp.int32),
      "u32": jnp.array([2**32 - 1], jnp.uint32),
      "i8": jnp.array([-128, 127], jnp.int8),
      "u8": jnp.arange(256, dtype=jnp.uint8),
      "bool": jnp.array([True, False]),
      "scalar": jnp.float32(np.pi),
    }
    with Checkpoints(tmp_path / "c", every=1, keep=1) as store:
      store.save(1, state, {})
    with Checkpoints(tmp_path / "c", every=1, keep=1) as store:
      step, found, meta = store.restore(_abstract(state))
    assert (step, meta) == (1, {})
    assert _raw(found) == _raw(state)
    assert _abstract(found) == _abstract(state)

  def test_an_optimizer_state_keeps_its_structure(self, tmp_path):
    weights = {"a": jnp.ones((4, 4)), "b": jnp.ones(3)}
    optimizer = optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.masked(optax.adam(1e-3), {"a": True, "b": False}),
    )
    state = {"weights": weights, "optimizer": optimizer.init(weights)}
    with Checkpoints(tmp_path, every=1, keep=1) as store:
      store.save(1, state, {})
      _, found, _ = store.restore(_abstract(state))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert _raw(found) == _raw(state)

  @pytest.mark.parametrize(("count", "axis"), [(1, 0), (2, 1), (4, 0), (8, 1)])
  def test_another_number_of_devices_reads_it(self, tmp_path, count, axis):
    _save_steps(tmp_path, 10)
    wanted = _state(10, _mesh(count), axis)
    with Checkpoints(tmp_path, every=10, keep=3) as store:
      _, found, _ = store.restore(_abstract(wanted))
    assert _raw(found) == _raw(wanted)
    assert found["weights"].sharding == wanted["weights"].sharding

  def test_meta_is_any_json(self, tmp_path):
    meta = {"data": [1, {"file": "ä"}], "rate": 0.1, "none": None, "3": True}
    with Checkpoints(tmp_path, every=1, keep=1) as store:
      store.save(1, {"a": jnp.ones(2)}, meta)
      assert store.restore(_abstract({"a": jnp.ones(2)}))[2] == meta

  def test_donated_buffers_do_not_reach_the_files(self, tmp_path):
    sharding = NamedSharding(_mesh(), P("x"))
    state = {"a": jax.device_put(jnp.ones((8, 2**18)), sharding)}
    advance = jax.jit(lambda s: {"a": s["a"] * 2 + 1}, donate_argnums=0)
    state = advance(state)
    with Checkpoints(tmp_path, every=1, keep=1) as store:
      store.save(1, state, {})
      for _ in range(8):
        state = advance(state)
      jax.block_until_ready(state)
    with Checkpoints(tmp_path, every=1, keep=1) as store:
      _, found, _ = store.restore(_abstract(state))
    assert np.all(np.asarray(found["a"]) == 3)

  def test_an_empty_directory_holds_nothing(self, tmp_path):
    with Checkpoints(tmp_path / "new", every=10, keep=3) as store:
      assert store.latest_step() is None
      assert store.restore(_abstract(_state(0, _mesh()))) is None


class TestSteps:
  def test_due(self, tmp_path):
    with Checkpoints(tmp_path, every=10, keep=1) as store:
      assert [s for s in range(1, 31) if store.due(s)] == [10, 20, 30]

  def test_the_newest_are_kept(self, tmp_path):
    _save_steps(tmp_path, 10, 20, 30, 33, keep=2)
    assert _names(tmp_path) == ["30", "33"]

  def test_a_step_that_is_there_is_left_alone(self, tmp_path):
    _save_steps(tmp_path, 10)
    with Checkpoints(tmp_path, every=10, keep=3) as store:
      store.save(10, _state(99, _mesh()), {"position": 99})
    _assert_is_step(_restore(tmp_path), 10, _mesh())

  def test_an_older_step_is_refused(self, tmp_path):
    _save_steps(tmp_path, 10)
    with pytest.raises(ValueError, match="cannot save step 5 .* step 10 is"):
      _save_steps(tmp_path, 5)

  @pytest.mark.parametrize("name", ["every", "keep"])
  def test_a_useless_interval_is_refused(self, tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} >= 1, not 0"):
      Checkpoints(tmp_path, **({"every": 1, "keep": 1} | {name: 0}))

  def test_what_a_killed_save_left_is_removed(self, tmp_path):
    _save_steps(tmp_path, 10)
    shutil.copytree(tmp_path / "10", tmp_path / "20.orbax-checkpoint-tmp")
    _save_steps(tmp_path, 30)
    assert _names(tmp_path) == ["10", "30"]
    _assert_is_step(_restore(tmp_path), 30, _mesh())


def _flip(data):
  middle = len(data) // 2
  return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
  folder = tmp_path_factory.mktemp("good")
  _save_steps(folder, 10, 20)
  return folder


class TestDamage:
  @pytest.mark.parametrize(
    "damage",
    [None, lambda data: data[: len(data) // 2], lambda data: b"", _flip],
    ids=["missing", "truncated", "empty", "flipped"],
  )
  def test_every_file(self, good, tmp_path, caplog, damage):
    """Each file in turn: the step is read as saved, or the one before is."""
    fell_back = []
    for name in sorted(good.glob("20/**/*")):
      name = name.relative_to(good)
      if not (good / name).is_file():
        continue
      folder = tmp_path / "c"
      shutil.rmtree(folder, ignore_errors=True)
      shutil.copytree(good, folder)
      if damage is None:
        (folder / name).unlink()
      else:
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
      caplog.clear()
      found = _restore(folder)
      if found[0] == 20:
        _assert_is_step(found, 20, _mesh())
        assert _names(folder) == ["10", "20"]
        assert not caplog.records
      else:
        _assert_is_step(found, 10, _mesh())
        assert _names(folder) == ["10", "damaged-20"]
        (warning,) = caplog.records
        assert "\n" not in warning.getMessage()
        assert re.match(
          r"checkpoint 20 is damaged \(.+\): moved to .*/damaged-20, going back to 10$",
          warning.getMessage(),
        )
        fell_back.append(str(name))
    assert "20/meta/metadata" in fell_back
    assert "20/state/manifest.ocdbt" in fell_back
    assert any(re.match("20/state/d/", name) for name in fell_back)

  @pytest.mark.parametrize("item", ["state", "meta"])
  def test_an_item_of_another_step_is_seen(self, good, tmp_path, caplog, item):
    """Files that are whole, but not those of this checkpoint."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "20" / item)
    shutil.copytree(tmp_path / "10" / item, tmp_path / "20" / item)
    _assert_is_step(_restore(tmp_path), 10, _mesh())
    assert "does not match its fingerprint" in caplog.text

  def test_a_number_changed_in_the_metadata_is_seen(
    self, good, tmp_path, caplog
  ):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "20" / "meta" / "metadata"
    record = json.loads(path.read_text())
    record["meta"]["position"] = 21
    path.write_text(json.dumps(record))
    _assert_is_step(_restore(tmp_path), 10, _mesh())
    assert "metadata do not match their checksum" in caplog.text

  def test_a_moved_step_is_saved_again_and_none_is_overwritten(
    self, good, tmp_path
  ):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    for expected in (["damaged-20"], ["damaged-20", "damaged-20-2"]):
      (tmp_path / "20" / "meta" / "metadata").write_text("{")
      with Checkpoints(tmp_path, every=10, keep=3) as store:
        found = store.restore(_abstract(_state(0, _mesh())))
        _assert_is_step(found, 10, _mesh())
        store.save(20, _state(20, _mesh()), {"position": 20})
      assert _names(tmp_path) == ["10", "20", *expected]
      _assert_is_step(_restore(tmp_path), 20, _mesh())

  def test_a_run_does_not_start_over_when_all_are_damaged(
    self, good, tmp_path, caplog
  ):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    for step in ("10", "20"):
      shutil.rmtree(tmp_path / step / "state")
    for _ in range(2):  # Nor when it is run again.
      with pytest.raises(CheckpointError) as caught:
        _restore(tmp_path)
      assert str(caught.value) == (
        f"no checkpoint in {tmp_path} reads back (set aside: damaged-10,"
        " damaged-20); remove what is set aside to start over"
      )
      assert _names(tmp_path) == ["damaged-10", "damaged-20"]
    first, second = (record.getMessage() for record in caplog.records)
    assert first.endswith("going back to 10")
    assert second.endswith("no other is left")
    for name in _names(tmp_path):
      shutil.rmtree(tmp_path / name)
    assert _restore(tmp_path) is None

  @pytest.mark.parametrize(
    ("change", "problem"),
    [
      (
        lambda s: s | {"weights": jnp.ones((16, 25))},
        r"weights is float32\[16,24\] there, float32\[16,25\] here$",
      ),
      (
        lambda s: s | {"weights": s["weights"].astype(jnp.bfloat16)},
        r"weights is float32\[16,24\] there, bfloat16\[16,24\] here$",
      ),
      (
        lambda s: s | {"bias": jnp.ones(3)},
        r"bias is absent there, float32\[3\] here$",
      ),
      (
        lambda s: {"weights": s["weights"]},
        r"optimizer/mean is bfloat16\[16,8\] there, absent here"
        r" \(1 more differ\)$",
      ),
    ],
    ids=["shape", "dtype", "added", "removed"],
  )
  def test_another_structure_is_no_damage(
    self, good, tmp_path, caplog, change, problem
  ):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    with (
      Checkpoints(tmp_path, every=10, keep=3) as store,
      pytest.raises(MismatchError, match=problem) as caught,
    ):
      store.restore(_abstract(change(_state(0, _mesh()))))
    assert "\n" not in str(caught.value)
    assert _names(tmp_path) == ["10", "20"]
    assert not caplog.records

  def test_a_sharding_that_does_not_divide_is_no_damage(self, good, tmp_path):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    abstract = _abstract(_state(0, _mesh()))
    sharding = NamedSharding(_mesh(5), P("x"))
    abstract["weights"] = jax.ShapeDtypeStruct(
      (16, 24), jnp.float32, sharding=sharding
    )
    with (
      Checkpoints(tmp_path, every=10, keep=3) as store,
      pytest.raises(ValueError, match="16"),
    ):
      store.restore(abstract)
    assert _names(tmp_path) == ["10", "20"]

  @pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE])
  def test_trouble_of_the_machine_is_no_damage(
    self, good, tmp_path, monkeypatch, code
  ):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    with Checkpoints(tmp_path, every=10, keep=3) as store:

      def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

      monkeypatch.setattr(store._manager, "restore", refuse)
      problem = f"^cannot read checkpoint 20 in .* {os.strerror(code)}$"
      with pytest.raises(CheckpointError, match=problem):
        store.restore(_abstract(_state(0, _mesh())))
    assert _names(tmp_path) == ["10", "20"]

  def test_what_the_system_refuses_tensorstore_is_no_damage(
    self, good, tmp_path
  ):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("20/state/d/*"):
      path.unlink()
      path.symlink_to(path)
    problem = "^cannot read checkpoint 20 in .* symbolic links"
    with pytest.raises(CheckpointError, match=problem):
      _restore(tmp_path)
    assert _names(tmp_path) == ["10", "20"]


class TestProcesses:
  def test_kill_9_leaves_the_old_checkpoint_or_the_new(self, tmp_path):
    """Kills savers at random moments, reads what is there, and goes on."""
    rng = random.Random(time.time_ns())
    folders = [tmp_path / str(i) for i in range(2)]
    for _ in range(2):
      savers = [_worker("save", folder, devices=2) for folder in folders]
      for folder, saver in zip(folders, savers):
        lines = [int(saver.stdout.readline()) for _ in range(rng.randint(2, 6))]
        time.sleep(rng.uniform(0, 0.3))
        saver.kill()
        lines += map(int, saver.stdout.read().split())
        assert saver.wait() == -signal.SIGKILL, saver.stderr.read()
        last = lines[-1]
        with Checkpoints(folder, every=1, keep=2) as store:
          found = store.restore(_abstract(_state(0, _mesh())))
          # `last` had been handed over, so the one before was complete.
          assert last - 1 <= found[0] <= last + 1
          _assert_is_step(found, found[0], _mesh())
          step = found[0] + 1
          store.save(step, _state(step, _mesh()), {"position": step})
        assert str(step) in _names(folder)
        assert all(name.isdecimal() for name in _names(folder))

  def test_a_full_disk_is_one_line_and_spares_the_last_checkpoint(
    self, tmp_path
  ):
    out, err = _finish(_worker("fill", tmp_path))
    at_save, at_close = out.splitlines()
    for line in (at_save, at_close):
      assert line.startswith(f"cannot save a checkpoint in {tmp_path}: ")
      assert "File too large" in line
    assert err == ""
    _assert_is_step(_restore(tmp_path), 30, _mesh())
    assert _names(tmp_path) == ["10", "30"]

  def test_a_fallback_says_one_line_and_nothing_else(self, tmp_path):
    _save_steps(tmp_path, 10, 20)
    for path in tmp_path.glob("20/state/d/*"):
      path.write_bytes(path.read_bytes()[:100])
    out, err = _finish(_worker("restore", tmp_path, devices=1))
    assert out == "10\n"
    (line,) = err.splitlines()
    assert "checkpoint 20 is damaged" in line

  def test_two_processes_save_together_and_fall_back_together(self, tmp_path):
    with socket.socket() as probe:
      probe.bind(("localhost", 0))
      port = probe.getsockname()[1]
    pair = [_worker("pair", tmp_path, port, i, devices=2) for i in range(2)]
    for process in pair:
      out, _ = _finish(process)
      assert out.splitlines()[-1] == "10 20"
    assert _names(tmp_path) == ["10", "20", "damaged-20"]
    _assert_is_step(_restore(tmp_path), 20, _mesh())


class TestLogging:
  def test_own_messages_pass_and_orbax_does_not(self, tmp_path, caplog):
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.INFO)
    try:
      logging.info("mine")
      _save_steps(tmp_path, 10)
      logging.info("mine too")
    finally:
      logging.set_verbosity(verbosity)
    assert [r.getMessage() for r in caplog.records] == ["mine", "mine too"]


def _save_for_ever(folder):
  mesh = _mesh()
  with Checkpoints(folder, every=1, keep=2) as store:
    found = store.restore(_abstract(_state(0, mesh)))
    step = found[0] if found else 0
    while True:
      step += 1
      store.save(step, _state(step, mesh), {"position": step})
      print(step, flush=True)


def _fill_the_disk(folder):
  """Two failed saves, of which the next save and the close hear."""

  def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

  def save(store, step):
    store.save(step, _state(step, _mesh()), {"position": step})

  store = Checkpoints(folder, every=10, keep=3)
  save(store, 10)
  store._manager.wait_until_finished()
  limit(1000)
  save(store, 20)
  try:
    save(store, 30)
  except CheckpointError as error:
    print(error)
  limit(resource.RLIM_INFINITY)
  save(store, 30)
  store._manager.wait_until_finished()
  limit(1000)
  save(store, 40)
  try:
    store.close()
  except CheckpointError as error:
    print(error)


def _restore_and_say(folder):
  print(_restore(folder)[0])


def _save_as_one_of_two(folder, port, index):
  jax.distributed.initialize(f"localhost:{port}", 2, int(index))
  mesh = _mesh()
  with Checkpoints(folder, every=10, keep=3) as store:
    for step in (10, 20):
      store.save(step, _state(step, mesh), {"position": step})
  if index == "0":
    (pathlib.Path(folder) / "20" / "meta" / "metadata").write_text("{")
  multihost_utils.sync_global_devices("damaged")
  with Checkpoints(folder, every=10, keep=3) as store:
    first = store.restore(_abstract(_state(0, mesh)))[0]
    store.save(20, _state(20, mesh), {"position": 20})
    store._manager.wait_until_finished()
    print(first, store.restore(_abstract(_state(0, mesh)))[0])


if __name__ == "__main__":
  command, *rest = sys.argv[1:]
  {
    "save": _save_for_ever,
    "fill": _fill_the_disk,
    "restore": _restore_and_say,
    "pair": _save_as_one_of_two,
  }[command](*rest)
