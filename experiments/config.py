"""Configuration of the binaries: a Python file, then dotted overrides.

A file's `get_config(arg: str = "")` returns a ConfigDict of scalars and
sections. A section that chooses a part holds its `name` and, beside it, the
part's arguments, which are the parameters of the factory behind that name:

  config.adapter = ConfigDict({"name": "lora", "rank": 8, "targets": "q|v"})

`app.run(main, flags_parser=config.flags_parser(REGISTRIES))` gives `main` the
complete config. REGISTRIES holds a `Section` for each section and the default
of each scalar.
"""

import contextlib
import copy
import dataclasses
import difflib
import functools
import inspect
import json
import pathlib
import re
import runpy
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from adaptax.experiments.arguments import Argument, freeze, signature

flags.disclaim_key_flags()

Registries = Mapping[str, Any]

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_SHIPPED = _ROOT / "experiments" / "configs"


@dataclasses.dataclass(frozen=True)
class Section:
  """What one section of a config may hold.

  Attributes:
    parts: factory by `name`; empty for a section that chooses no part.
    supplied: parameters that the program passes to the factories itself.
    keys: defaults of the keys that are the section's own, not the part's.
  """

  parts: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
  supplied: Collection[str] = ()
  keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def flags_parser(
  registries: Registries, flag_values: flags.FlagValues = flags.FLAGS
) -> Callable[[list[str]], ConfigDict]:
  """The `flags_parser` of `app.run`: `main` receives the config.

  Defines --config=FILE[:arg], overridden by --config.key=value or
  --config.key value. A bad command line ends in one line and exit status 2.
  """
  flags.DEFINE_string(
    "config",
    None,
    "Config file, or name of a shipped one; FILE:arg calls get_config(arg).",
    flag_values=flag_values,
  )

  def parse(argv):
    try:
      argv, overrides = _split(flag_values.read_flags_from_files(argv))
      if extra := flag_values(argv)[1:]:
        raise ValueError(f"unexpected argument {extra[0]!r}")
      return check(load(flag_values["config"].value), registries, overrides)
    except (flags.Error, ValueError) as error:
      print(f"{pathlib.Path(argv[0]).name}: {error}", file=sys.stderr)
      sys.exit(2)

  return parse


def load(path: str | None) -> ConfigDict:
  """Returns get_config(arg) of the file in `path`, which is FILE[:arg].

  What is no file here is looked for in the installed package, then among the
  names of the shipped configs.
  """
  file, _, arg = (path or "").partition(":")
  places = (pathlib.Path(file), _ROOT / file, _SHIPPED / f"{file}.py")
  found = next((place for place in places if place.is_file()), None)
  if found is None:
    shipped = sorted(place.stem for place in _SHIPPED.glob("[!_]*.py"))
    problem = f"no config file {file}" if file else "--config is missing"
    raise ValueError(f"{problem} (shipped: {', '.join(shipped)})")
  get_config = runpy.run_path(str(found)).get("get_config")
  if get_config is None:
    raise ValueError(f"{found} defines no get_config")
  given = (arg,) if arg else ()
  try:
    inspect.signature(get_config).bind(*given)
  except TypeError as error:
    raise ValueError(
      f"--config={path} does not fit get_config of {found}: {error}"
    ) from None
  return get_config(*given)


def check(
  config: ConfigDict,
  registries: Registries,
  overrides: Mapping[str, str] | None = None,
) -> ConfigDict:
  """Returns the complete config: overrides applied, defaults filled in.

  A part chosen by an override starts from its own defaults and keeps those
  values of the section that it has an argument for. Fields that refer to
  others follow the overrides.

  Raises:
    ValueError: an unknown key or name, a value missing or of a wrong type.
  """
  config, overrides = copy.deepcopy(config), overrides or {}
  with config.unlocked(), config.ignore_type():
    known = _choose_parts(config, registries, overrides)
    for key in (*_flatten(config), *overrides):
      if key not in known:
        raise _unknown_key(key, config, known)
    for key, text in overrides.items():
      section, leaf = _locate(config, key)
      section[leaf] = known[key].parse(key, text)
  complete = config.to_dict()
  for key, argument in known.items():
    section, leaf = _locate(complete, key)
    section[leaf] = argument.fit(key, section.get(leaf, argument.default))
  return ConfigDict(complete).lock()


def bind(
  section: ConfigDict,
  registry: Section,
  changes: Mapping[str, Any] | None = None,
  key: str = "",
) -> functools.partial:
  """The factory that the section names, with its arguments bound.

  Args:
    section: complete, as `check` returns it.
    registry: of the section.
    changes: what replaces some of the section's arguments.
    key: where the changes stand in the config.

  Raises:
    ValueError: an unknown argument in `changes`, or one of a wrong type.
  """
  arguments = section.to_dict()
  name = arguments.pop("name")
  own = {k: v for k, v in arguments.items() if k not in registry.keys}
  for leaf, value in (changes or {}).items():
    if leaf not in own:
      hint = _nearest(leaf, own)
      raise ValueError(f"unknown config key {key}.{leaf} for {name!r}{hint}")
    own[leaf] = _arguments(registry, name)[leaf].fit(f"{key}.{leaf}", value)
  return functools.partial(registry.parts[name], **own)


def build(section: ConfigDict, registry: Section, **supplied) -> Any:
  """Calls the part with its arguments and with what it takes of `supplied`."""
  factory = bind(section, registry)
  takes = signature(factory)
  return factory(**{k: v for k, v in supplied.items() if k in takes})


def to_json(config: ConfigDict) -> str:
  return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
  """The config that `to_json` wrote; it holds tuples, never lists."""
  return ConfigDict(freeze(json.loads(text))).lock()


def difference(
  old: ConfigDict, new: ConfigDict, may_differ: Collection[str] = ()
) -> list[str]:
  """One line for each key that differs, save the keys or sections given."""
  before, after = _flatten(old), _flatten(new)
  lines = []
  for key in sorted(before.keys() | after.keys()):
    there, here = (
      repr(freeze(flat[key])) if key in flat else "absent"
      for flat in (before, after)
    )
    if there != here and not {key, key.partition(".")[0]} & set(may_differ):
      lines.append(f"{key}: {there} in the work dir, {here} here")
  return lines


def _split(argv: list[str]) -> tuple[list[str], dict[str, str]]:
  """Separates the overrides from the flags that absl parses."""
  rest, overrides = [], {}
  words = iter(argv)
  for word in words:
    if not re.match(r"--?config\.", word):
      rest.append(word)
      continue
    key, joined, text = word.partition("=")
    if not joined:
      text = next(words, "--")
      if text.startswith("--"):
        raise ValueError(f"{key} needs a value")
    overrides[key.partition(".")[2]] = text
  return rest, overrides


def _choose_parts(
  config: ConfigDict, registries: Registries, overrides: Mapping[str, str]
) -> dict[str, Argument]:
  """Switches sections to the names chosen; returns all that may be set."""
  known = {}
  for key, registry in registries.items():
    if not isinstance(registry, Section):
      known[key] = Argument.of(registry)
      continue
    if key not in config:
      config[key] = ConfigDict()
    section = config[key]
    if not isinstance(section, ConfigDict):
      raise ValueError(f"config key {key}: {section!r} is no section")
    name = overrides.get(f"{key}.name", section.get("name"))
    if registry.parts and name not in tuple(registry.parts):
      hint = _nearest(str(name or ""), registry.parts)
      raise ValueError(f"unknown {key}.name {name!r}{hint}")
    arguments = _arguments(registry, name)
    if name != section.get("name"):
      section.name = name
      _keep_common(section, arguments, registry)
    known |= {f"{key}.{leaf}": value for leaf, value in arguments.items()}
  return known


def _arguments(registry: Section, name: str) -> dict[str, Argument]:
  """What may stand in a section that names the part `name`."""
  found = {k: Argument.of(default) for k, default in registry.keys.items()}
  if not registry.parts:
    return found
  for key, parameter in signature(registry.parts[name]).items():
    variadic = str(parameter).startswith("*")
    if not variadic and key not in {*found, *registry.supplied}:
      # A default that JSON cannot hold is no business of a config.
      with contextlib.suppress(ValueError):
        found[key] = Argument.of(parameter.default, parameter.annotation)
  return {"name": Argument.of(name), **found}


def _keep_common(
  section: ConfigDict, arguments: Mapping[str, Argument], registry: Section
) -> None:
  """Drops what the newly chosen part has no argument of that type for."""
  for key in set(section) - set(registry.keys):
    try:
      arguments[key].fit(key, section[key])
    except (KeyError, ValueError):
      del section[key]


def _locate(config: Any, key: str) -> tuple[Any, str]:
  section, _, leaf = key.rpartition(".")
  return (config[section] if section else config), leaf


def _flatten(config: ConfigDict) -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      flat |= {f"{key}.{leaf}": value[leaf] for leaf in value}
    else:
      flat[key] = value
  return flat


def _nearest(given: str, allowed: Iterable[str], prefix: str = "") -> str:
  near = difflib.get_close_matches(given, sorted(allowed), n=1)
  hint = f": did you mean {prefix}{near[0]}?" if near else ""
  return f"{hint} (allowed: {', '.join(sorted(allowed))})"


def _unknown_key(
  key: str, config: ConfigDict, known: Iterable[str]
) -> ValueError:
  section, _, leaf = key.partition(".")
  inside = [k.partition(".")[2] for k in known if k.startswith(f"{section}.")]
  if not inside:
    hint = _nearest(section, {k.partition(".")[0] for k in known})
    return ValueError(f"unknown config key {key}{hint}")
  part = f" for {config[section].name!r}" if "name" in inside else ""
  hint = _nearest(leaf, inside, f"{section}.")
  return ValueError(f"unknown config key {key}{part}{hint}")
