"""What the parameters of a factory say about the values of a config."""

import ast
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

_PLAIN = {bool, int, float, str, types.NoneType}
_REQUIRED = inspect.Parameter.empty


class Argument(typing.NamedTuple):
  """A key's default, or _REQUIRED, and the types it may have (none: any)."""

  default: Any
  kinds: frozenset[type]

  @classmethod
  def of(cls, default, hint=_REQUIRED):
    """Goes by the annotation `hint` if that is plain, else by the default."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    hints = typing.get_args(hint) if union else (hint,)
    kinds = {typing.get_origin(one) or one for one in hints}
    plain = kinds <= {*_PLAIN, tuple, dict}
    if not plain:
      kinds &= {types.NoneType}
    if default is None or not (plain or default is _REQUIRED):
      kinds.add(type(freeze(default)))
    return cls(default, frozenset(() if kinds <= {types.NoneType} else kinds))

  def fit(self, key: str, value: Any) -> Any:
    if value is _REQUIRED:
      raise ValueError(f"config key {key} is missing: give --config.{key}=...")
    value = freeze(value, key)
    if not self.kinds or type(value) in self.kinds:
      return value
    if type(value) is int and float in self.kinds:
      return float(value)
    names = sorted(kind.__name__.removesuffix("Type") for kind in self.kinds)
    raise ValueError(f"config key {key}: {value!r} is no {' or '.join(names)}")

  def parse(self, key: str, text: str) -> Any:
    """Reads a Python literal; text that is none can only be a string."""
    literal = {"true": "True", "false": "False"}.get(text, text)
    try:
      return self.fit(key, ast.literal_eval(literal))
    except (SyntaxError, TypeError, ValueError):
      return self.fit(key, text)


def signature(factory: Callable) -> Mapping[str, inspect.Parameter]:
  """Parameters by name; looks behind metaclasses that hide `__init__`."""
  call = functools.partial(factory)
  if isinstance(call.func, type):
    init = call.func.__init__  # type: ignore[misc]
    call = functools.partial(init, None, *call.args, **call.keywords)
  return inspect.signature(call, eval_str=True).parameters


def freeze(value: Any, key: str = "") -> Any:
  """Lists as tuples and ConfigDicts as dicts, of what JSON can hold."""
  if isinstance(value, list | tuple):
    return tuple(freeze(item, key) for item in value)
  if isinstance(value, dict | ConfigDict):
    return {name: freeze(value[name], key) for name in value}
  if type(value) not in _PLAIN:
    raise ValueError(f"config key {key}: {value!r} does not fit into JSON")
  return value
