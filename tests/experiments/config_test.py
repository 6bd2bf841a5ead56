"""Config files, overrides and their errors, on sample registries."""

import functools
import pathlib
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from absl import flags
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from adaptax.experiments import config as config_lib
from adaptax.experiments.config import Section


def lora(base, rank: int, alpha: float | None = None, init="kaiming", *, rngs):
  return ("lora", base, rank, alpha, init, rngs)


def bone(base, rank: int = 16, init: bool = True, block=(2, 2), **unused):
  return ("bone", base, rank, init, block)


class Rotation(nnx.Module):
  def __init__(self, base, angles: dict | None = None, *, rngs, dtype=np.int8):
    self.rank, self.angles = rngs, angles


def sgd(learning_rate, momentum: float = 0, nesterov=False, mask=None):
  return (learning_rate, momentum, nesterov, mask)


REGISTRIES = {
  "adapter": Section(
    parts={
      "lora": lora,
      "wide_lora": functools.partial(lora, rank=64),
      "bone": bone,
      "rotation": Rotation,
      "none": lambda: None,
    },
    supplied={"base", "rngs"},
    keys={"targets": "q|v", "rules": None},
  ),
  "optimizer": Section(
    parts={"sgd": sgd},
    supplied={"learning_rate"},
    keys={"learning_rate": 0.1},
  ),
  "eval": Section(keys={"every": 10, "path": ""}),
  "steps": 100,
  "seed": 0,
}


def sample():
  return ConfigDict(
    {
      "adapter": {"name": "lora", "rank": 8, "init": "pissa", "targets": "k"},
      "optimizer": {"name": "sgd", "momentum": 1},
      "steps": 20,
    }
  )


FILE = """
from ml_collections import ConfigDict
def get_config(arg: str = ""):
  return ConfigDict({
    "adapter": {"name": "lora", "rank": int(arg or 8), "init": "pissa"},
    "optimizer": {"name": "sgd"},
  })
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "small.py"
  path.write_text(FILE)
  return path


def parse(*words):
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", "", "", flag_values=values)
  parser = config_lib.flags_parser(REGISTRIES, values)
  return parser(["train.py", *map(str, words)]), values


def refuse(capsys, *words):
  """The line that a bad command line prints before it exits with 2."""
  with pytest.raises(SystemExit) as exit:
    parse(*words)
  assert exit.value.code == 2
  out, err = capsys.readouterr()
  assert not out
  assert err.startswith("train.py: ") and err.count("\n") == 1
  return err.removeprefix("train.py: ").strip()


def check(**overrides):
  dotted = {key.replace("__", "."): text for key, text in overrides.items()}
  return config_lib.check(sample(), REGISTRIES, dotted)


class TestCheck:
  def test_fills_in_every_default(self):
    assert check().to_dict() == {
      "adapter": {
        "name": "lora",
        "rank": 8,
        "alpha": None,
        "init": "pissa",
        "targets": "k",
        "rules": None,
      },
      "optimizer": {
        "name": "sgd",
        "learning_rate": 0.1,
        "momentum": 1.0,
        "nesterov": False,
        "mask": None,
      },
      "eval": {"every": 10, "path": ""},
      "steps": 20,
      "seed": 0,
    }

  def test_takes_ints_for_floats(self):
    config = check(optimizer__learning_rate="2")
    assert type(config.optimizer.momentum) is float
    assert type(config.optimizer.learning_rate) is float

  def test_is_idempotent_locked_and_leaves_its_argument_alone(self):
    config = sample()
    complete = config_lib.check(config, REGISTRIES)
    assert config == sample()
    assert config_lib.check(complete, REGISTRIES) == complete
    with pytest.raises(AttributeError):
      complete.stpes = 1

  def test_fields_that_refer_to_others_follow_overrides(self):
    config = sample()
    config.eval = ConfigDict()
    config.eval.every = config.get_ref("steps") // 10
    assert config_lib.check(config, REGISTRIES).eval.every == 2
    complete = config_lib.check(config, REGISTRIES, {"steps": "500"})
    assert complete.eval.every == 50
    complete = config_lib.check(config, REGISTRIES, {"eval.every": "7"})
    assert (complete.eval.every, complete.steps) == (7, 20)

  @pytest.mark.parametrize(
    ("key", "value", "message"),
    [
      ("stpes", 1, "unknown config key stpes: did you mean steps?"),
      ("adapter.rnak", 1, "adapter.rnak for 'lora': did you mean adapter.rank"),
      ("adapter.rank", "8", "config key adapter.rank: '8' is no int"),
      ("adapter.rank", True, "config key adapter.rank: True is no int"),
      ("adapter.init", np.float32, "adapter.init: .* does not fit into JSON"),
      ("adapter.rules", (1, {"a": np.ones(1)}), "adapter.rules: array"),
      ("adapter.name", "loar", "adapter.name 'loar': did you mean lora?"),
      ("adapter.name", None, "unknown adapter.name None .allowed: bone, lora"),
      ("adapter", 3, "config key adapter: 3 is no section"),
      ("steps", {"a": 1}, "unknown config key steps.a"),
      (
        "evla",
        {"every": 1},
        "unknown config key evla.every: did you mean eval",
      ),
    ],
  )
  def test_refuses_a_bad_file(self, key, value, message):
    config = sample()
    section, _, leaf = key.rpartition(".")
    with config.ignore_type():
      (config[section] if section else config)[leaf] = value
    with pytest.raises(ValueError, match=message):
      config_lib.check(config, REGISTRIES)

  def test_names_a_missing_value(self):
    config = sample()
    del config.adapter.rank
    with pytest.raises(ValueError, match=r"adapter\.rank is missing"):
      config_lib.check(config, REGISTRIES)
    complete = config_lib.check(config, REGISTRIES, {"adapter.rank": "2"})
    assert complete.adapter.rank == 2

  def test_names_a_missing_section(self):
    config = sample()
    del config.optimizer
    with pytest.raises(ValueError, match=r"optimizer\.name None.*: sgd"):
      config_lib.check(config, REGISTRIES)


class TestOtherPart:
  def test_keeps_what_it_shares_with_the_file_and_drops_the_rest(self):
    # bone also has an `init`, but of another type.
    assert check(adapter__name="bone").adapter.to_dict() == {
      "name": "bone",
      "rank": 8,
      "init": True,
      "block": (2, 2),
      "targets": "k",
      "rules": None,
    }

  @pytest.mark.parametrize("name_first", [True, False])
  def test_takes_overrides_in_any_order(self, name_first, file):
    words = ["--config.adapter.name=bone", "--config.adapter.block=(4,)"]
    config, _ = parse(f"--config={file}", *words[:: 1 if name_first else -1])
    assert config.adapter.block == (4,)
    assert config.adapter.rank == 8

  def test_partial_gives_its_own_defaults(self):
    config = sample()
    del config.adapter.rank
    complete = config_lib.check(
      config, REGISTRIES, {"adapter.name": "wide_lora"}
    )
    assert complete.adapter.rank == 64

  def test_class_hides_neither_arguments_nor_unwritable_defaults(self):
    adapter = check(
      adapter__name="rotation", adapter__angles="{'q': 1}"
    ).adapter
    assert adapter.to_dict() == {
      "name": "rotation",
      "angles": {"q": 1},
      "targets": "k",
      "rules": None,
    }

  def test_none_is_a_name(self):
    adapter = check(adapter__name="none").adapter
    assert set(adapter) == {"name", "targets", "rules"}

  def test_refuses_an_argument_of_the_old_part(self):
    with pytest.raises(ValueError, match=r"key adapter\.alpha for 'bone'"):
      check(adapter__name="bone", adapter__alpha="4")

  def test_same_name_changes_nothing(self):
    assert check(adapter__name="lora") == check()


class TestValues:
  @pytest.mark.parametrize(
    ("key", "text", "value"),
    [
      ("steps", "-3", -3),
      ("optimizer.learning_rate", "1e-3", 1e-3),
      ("optimizer.momentum", "0.9", 0.9),  # its default is the int 0
      ("optimizer.nesterov", "true", True),
      ("optimizer.nesterov", "True", True),
      ("optimizer.nesterov", "false", False),
      ("optimizer.mask", "None", None),
      ("optimizer.mask", "(1, 'a')", (1, "a")),
      ("optimizer.mask", "[1, [2]]", (1, (2,))),
      ("optimizer.mask", "{'a': [1]}", {"a": (1,)}),
      ("optimizer.mask", "some words", "some words"),
      ("adapter.alpha", "4", 4.0),
      ("adapter.alpha", "None", None),
      ("adapter.targets", "10", "10"),
      ("adapter.targets", "'10'", "10"),
      ("adapter.targets", "None", "None"),
      ("adapter.targets", "a=b", "a=b"),
      ("adapter.targets", "", ""),
    ],
  )
  @pytest.mark.parametrize("joined", [True, False])
  def test_parses(self, key, text, value, joined, file):
    words = [f"--config.{key}={text}"] if joined else [f"--config.{key}", text]
    config, values = parse(f"--config={file}", *words, "--workdir=x")
    section, _, leaf = key.rpartition(".")
    found = (config.to_dict()[section] if section else config)[leaf]
    assert found == value and type(found) is type(value)
    assert values.workdir == "x"

  @pytest.mark.parametrize(
    ("key", "text", "message"),
    [
      ("steps", "abc", "config key steps: 'abc' is no int"),
      ("steps", "1.5", "config key steps: '1.5' is no int"),
      ("steps", "True", "config key steps: 'True' is no int"),
      ("steps", "None", "config key steps: 'None' is no int"),
      ("optimizer.nesterov", "1", "optimizer.nesterov: '1' is no bool"),
      ("optimizer.momentum", "x", "optimizer.momentum: 'x' is no float"),
      ("adapter.alpha", "x", "adapter.alpha: 'x' is no None or float"),
    ],
  )
  def test_refuses_a_wrong_type(self, capsys, file, key, text, message):
    line = refuse(capsys, f"--config={file}", f"--config.{key}={text}")
    assert message in line


class TestCommandLine:
  @pytest.mark.parametrize(
    ("words", "message"),
    [
      (
        ["--config.adapter.rnak=4"],
        "unknown config key adapter.rnak for 'lora': did you mean adapter.rank?"
        " (allowed: alpha, init, name, rank, rules, targets)",
      ),
      (["--config.adaptr.rank=4"], "key adaptr.rank: did you mean adapter?"),
      (["--config.stpes=4"], "unknown config key stpes: did you mean steps?"),
      (["--config.steps.x=4"], "unknown config key steps.x"),
      (["--config.adapter=bone"], "unknown config key adapter for 'lora' (all"),
      (
        ["--config.adapter.name=bne"],
        "unknown adapter.name 'bne': did you mean bone?"
        " (allowed: bone, lora, none, rotation, wide_lora)",
      ),
      (["--config.steps"], "--config.steps needs a value"),
      (["--config.steps", "--workdir=x"], "--config.steps needs a value"),
      (["--wrokdir=x"], "Unknown command line flag 'wrokdir'. Did you mean"),
      (["stray"], "unexpected argument 'stray'"),
    ],
  )
  def test_refuses_in_one_line(self, capsys, file, words, message):
    assert message in refuse(capsys, f"--config={file}", *words)

  def test_last_override_wins(self, file):
    config, _ = parse(
      "--config.steps=1", f"--config={file}", "-config.steps", "2"
    )
    assert config.steps == 2

  def test_reads_overrides_from_a_flagfile(self, file, tmp_path):
    (tmp_path / "run.flags").write_text(
      f"--config={file}\n--config.steps=7\n--workdir=y\n"
    )
    config, values = parse(f"--flagfile={tmp_path / 'run.flags'}")
    assert (config.steps, values.workdir) == (7, "y")


class TestLoad:
  def test_passes_the_argument(self, file):
    assert config_lib.load(f"{file}:32").adapter.rank == 32
    assert config_lib.load(str(file)).adapter.rank == 8

  def test_refuses_an_argument_that_nobody_takes(self, capsys, file):
    file.write_text(FILE.replace('arg: str = ""', "").replace("arg or 8", "8"))
    assert config_lib.load(str(file)).adapter.rank == 8
    line = refuse(capsys, f"--config={file}:foo")
    assert line == (
      f"--config={file}:foo does not fit get_config of {file}: too many"
      " positional arguments"
    )

  def test_asks_for_an_argument(self, capsys, file):
    file.write_text(FILE.replace('arg: str = ""', "arg"))
    assert "missing a required argument: 'arg'" in refuse(
      capsys, f"--config={file}"
    )

  def test_finds_shipped_files_from_anywhere(self, tmp_path, monkeypatch):
    package = tmp_path / "adaptax"
    shipped = package / "experiments" / "configs"
    shipped.mkdir(parents=True)
    (shipped / "__init__.py").touch()
    (shipped / "tiny.py").write_text(FILE)
    (shipped / "large.py").write_text(FILE)
    monkeypatch.setattr(config_lib, "_ROOT", package)
    monkeypatch.setattr(config_lib, "_SHIPPED", shipped)
    here = tmp_path / "here"
    (here / "tiny").mkdir(parents=True)
    monkeypatch.chdir(here)
    for path in ("experiments/configs/tiny.py:4", "tiny:4"):
      assert config_lib.load(path).adapter.rank == 4
    for path in ("tyni", "elsewhere/tiny.py", str(here / "tiny.py")):
      with pytest.raises(ValueError, match=r"no config file .*large, tiny\)"):
        config_lib.load(path)
    (here / "tiny.py").write_text(FILE.replace("arg or 8", "5"))
    assert config_lib.load("tiny.py").adapter.rank == 5

  def test_looks_into_the_package_it_is_in(self):
    # Of the real package only the place is fixed here.
    root = pathlib.Path(config_lib.__file__).resolve().parents[1]
    assert root == config_lib._ROOT
    assert (config_lib._SHIPPED / "__init__.py").is_file()

  def test_asks_for_a_config(self, capsys):
    assert "--config is missing (shipped: " in refuse(capsys)

  def test_names_a_missing_file(self, capsys):
    line = refuse(capsys, "--config=missing.py")
    assert "no config file missing.py (shipped: " in line

  def test_refuses_a_file_without_get_config(self, capsys, tmp_path):
    (tmp_path / "empty.py").touch()
    line = refuse(capsys, f"--config={tmp_path / 'empty.py'}")
    assert "empty.py defines no get_config" in line

  def test_shows_an_error_of_get_config(self, capsys, file):
    assert "invalid literal" in refuse(capsys, f"--config={file}:abc")


class TestBuild:
  def test_calls_the_factory_with_its_arguments_and_what_it_takes(self):
    section = REGISTRIES["adapter"]
    config = check(adapter__rank="4", adapter__alpha="2")
    built = config_lib.build(config.adapter, section, base="w", rngs=3)
    assert built == ("lora", "w", 4, 2.0, "pissa", 3)
    config = check(adapter__name="bone")
    built = config_lib.build(config.adapter, section, base="w", rngs=3)
    assert built == ("bone", "w", 8, True, (2, 2))
    config = check(adapter__name="none")
    assert config_lib.build(config.adapter, section, base="w", rngs=3) is None

  def test_builds_a_class(self):
    config = check(adapter__name="rotation", adapter__angles="{'q': 1}")
    built = config_lib.build(
      config.adapter, REGISTRIES["adapter"], base="w", rngs=3
    )
    assert isinstance(built, Rotation)
    assert built.rank == 3
    assert type(built.angles) is dict

  def test_section_key_does_not_reach_the_part(self):
    config = check(optimizer__learning_rate="0.5")
    built = config_lib.build(
      config.optimizer, REGISTRIES["optimizer"], learning_rate="schedule"
    )
    assert built == ("schedule", 1.0, False, None)

  def test_bind_leaves_the_supplied_ones_open(self):
    factory = config_lib.bind(check().adapter, REGISTRIES["adapter"])
    assert factory("w", rngs=1) == ("lora", "w", 8, None, "pissa", 1)

  def test_bind_takes_changes(self):
    adapter, registry = check().adapter, REGISTRIES["adapter"]
    factory = config_lib.bind(adapter, registry, {"rank": 2, "alpha": 3})
    assert factory("w", rngs=1) == ("lora", "w", 2, 3.0, "pissa", 1)
    assert adapter.rank == 8

  @pytest.mark.parametrize(
    ("changes", "message"),
    [
      (
        {"rnak": 2},
        "unknown config key there.rnak for 'lora': did you mean rank? (allowed:"
        " alpha, init, rank)",
      ),
      ({"targets": "q"}, "unknown config key there.targets for 'lora' (allo"),
      ({"rank": "2"}, "config key there.rank: '2' is no int"),
    ],
  )
  def test_bind_refuses_changes_that_do_not_fit(self, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
      config_lib.bind(check().adapter, REGISTRIES["adapter"], changes, "there")


plain = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats(allow_nan=False, allow_infinity=False)
  | st.text(),
  lambda inner: (
    st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3)
  ),
  max_leaves=6,
)


class TestJson:
  @given(plain)
  def test_round_trip(self, value):
    config = check(adapter__rules=repr(value))
    assert config.to_dict()["adapter"]["rules"] == value
    again = config_lib.from_json(config_lib.to_json(config))
    assert again == config == config_lib.check(again, REGISTRIES)
    assert repr(again.to_dict()) == repr(config.to_dict())
    assert not config_lib.difference(again, config)


class TestDifference:
  def test_names_each_value(self):
    old, new = check(), check(optimizer__learning_rate="0.2", steps="30")
    assert config_lib.difference(old, new) == [
      "optimizer.learning_rate: 0.1 in the work dir, 0.2 here",
      "steps: 20 in the work dir, 30 here",
    ]

  def test_names_what_only_one_has(self):
    assert config_lib.difference(check(), check(adapter__name="bone")) == [
      "adapter.alpha: None in the work dir, absent here",
      "adapter.block: absent in the work dir, (2, 2) here",
      "adapter.init: 'pissa' in the work dir, True here",
      "adapter.name: 'lora' in the work dir, 'bone' here",
    ]

  @pytest.mark.parametrize("free", ["eval", "eval.every"])
  def test_leaves_out_what_may_differ(self, free):
    old, new = check(), check(eval__every="3", steps="5", seed="1")
    assert config_lib.difference(old, new, {"steps", free}) == [
      "seed: 0 in the work dir, 1 here"
    ]
    assert len(config_lib.difference(old, new, {"ste", "eval.e"})) == 3


BINARY = """
from absl import app, flags
from adaptax.experiments import config

flags.DEFINE_string("workdir", None, "Where to write.")
REGISTRIES = {"steps": 3, "data": config.Section(keys={"path": "here"})}

def main(config):
  print(config.steps, config.data.path, flags.FLAGS.workdir)

if __name__ == "__main__":
  app.run(main, flags_parser=config.flags_parser(REGISTRIES))
"""


@pytest.fixture
def binary(tmp_path):
  (tmp_path / "binary.py").write_text(BINARY)
  (tmp_path / "small.py").write_text(
    textwrap.dedent("""
      from ml_collections import ConfigDict
      def get_config(arg=""):
        return ConfigDict({"data": {"path": arg or "there"}})
    """)
  )

  def run(*words):
    return subprocess.run(
      [sys.executable, "binary.py", *words],
      cwd=tmp_path,
      capture_output=True,
      text=True,
    )

  return run


class TestBinary:
  def test_main_receives_the_config(self, binary):
    done = binary(
      "--config.steps", "5", "--config=small.py:x", "--workdir=work"
    )
    assert (done.returncode, done.stdout) == (0, "5 x work\n"), done.stderr

  def test_mistake_is_one_line_and_status_2(self, binary):
    done = binary("--config=small.py", "--config.data.paht=x")
    assert done.returncode == 2
    assert done.stderr == (
      "binary.py: unknown config key data.paht: did you mean data.path?"
      " (allowed: path)\n"
    )

  def test_help_shows_the_flag(self, binary):
    assert "--config: Config file" in binary("--help").stdout
