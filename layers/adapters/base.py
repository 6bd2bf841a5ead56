"""The adapter protocol: wrap a linear map, train a small change, merge it."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import jax
from flax import nnx

from adaptax.layers.linear import is_linear

Factory = Callable[..., "Adapter"]


class AdapterParam(nnx.LoRAParam):
  """A trainable leaf of an adapter; every other leaf of a model is frozen."""


class AdapterBuffer(nnx.Variable):
  """A leaf of an adapter that is stored with it but not trained."""


class Adapter(nnx.Module):
  """A linear map with a trainable change and the same call signature.

  A subclass takes `(base, *, ..., rngs)`, keeps its trainable leaves in
  `AdapterParam`s and its mathematics in pure functions beside the class.
  Inside a scanned stack it is constructed under `vmap`, so shapes must not
  depend on values.

  Attributes:
    name: what configs call the method.
    base: the wrapped linear map, frozen.
  """

  name: ClassVar[str]
  base: Any

  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps x (..., in) to (..., out)."""
    raise NotImplementedError

  def merge(self) -> nnx.Linear:
    """Returns a plain linear map with the change folded in.

    Raises:
      ValueError: if the method's change is no linear map.
    """
    raise NotImplementedError


def adapt(model: Any, rules: Mapping[str, Factory], *, rngs: nnx.Rngs) -> Any:
  """Wraps linear maps of a model, chosen by path, in adapters.

  Inside a stack of blocks one adapter serves all layers: its leaves have the
  leading layer axis, each layer initialised on its own.

  Args:
    model: any NNX module. It is left as it is; the result shares its arrays.
    rules: from a regular expression to a factory `f(base, *, rngs)`. A path
      such as `layers/attention/q` matches if the expression matches all of it
      or all that follows a slash; the first rule that matches wins.
    rngs: source of the adapters' initial values.

  Raises:
    ValueError: if a rule is no regular expression or matches no linear map
      (the error lists close paths).
  """

  def make(rule, base, size):
    return _wrap(rules[rule], base, size, rngs)

  return replace_linear(model, rules, make)


def merge(model: Any) -> Any:
  """Returns the model with every adapter folded into a plain linear map."""
  model = nnx.clone(model)
  for path, adapter, size in adapters(model):
    fold = lambda adapter: adapter.merge()
    plain = fold(adapter) if size is None else nnx.vmap(fold)(adapter)
    model = _replace(model, path, plain)
  return model


def replace_linear(
  model: Any,
  rules: Iterable[str],
  make: Callable[[str, Any, int | None], nnx.Module],
) -> Any:
  """Replaces linear maps of a model, chosen by path as in `adapt`.

  Args:
    model: any NNX module. It is left as it is; the result shares its arrays.
    rules: regular expressions, the first that matches wins.
    make: from the rule, the map and its stack size to what takes its place.

  Raises:
    ValueError: if a rule is no regular expression or matches no linear map,
      or `make` raises it.
  """
  model = nnx.clone(model)
  targets = list(_linear_maps(model))
  unused = dict.fromkeys(rules)
  for path, module, size in targets:
    rule = find_rule(path, rules)
    if rule is None:
      continue
    unused.pop(rule, None)
    try:
      module = make(rule, module, size)
    except ValueError as error:
      raise ValueError(f"{path or 'the model'}: {error}") from error
    model = _replace(model, path, module)
  for rule in unused:
    raise _no_match(rule, [path for path, *_ in targets])
  return model


def adapters(model: Any) -> list[tuple[str, Adapter, int | None]]:
  """Returns (path, adapter, stack size or None) for every adapter."""
  return [
    ("/".join(map(str, path)), module, size)
    for path, module, size in _modules(model)
    if isinstance(module, Adapter)
  ]


def trainable_filter(model: Any) -> type[nnx.Variable]:
  """What a run trains: the adapters, or all weights where there is none."""
  return AdapterParam if adapters(model) else nnx.Param


def trainable(model: Any) -> nnx.State:
  """Returns the state that a run trains; everything else stays frozen."""
  return nnx.state(model, trainable_filter(model))


@dataclasses.dataclass(frozen=True)
class Count:
  """Sizes of a model's parameters.

  Attributes:
    trainable: number of trained parameters.
    total: number of all parameters, trained ones included.
    trainable_bytes: storage of the trained parameters.
    total_bytes: storage of all parameters.
  """

  trainable: int
  total: int
  trainable_bytes: int
  total_bytes: int


def count(model: Any) -> Count:
  """Counts parameters and bytes; works on abstract models too."""
  some = jax.tree.leaves(trainable(model))
  every = jax.tree.leaves(nnx.state(model, nnx.Not(nnx.RngState)))
  return Count(
    trainable=sum(leaf.size for leaf in some),
    total=sum(leaf.size for leaf in every),
    trainable_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in some),
    total_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in every),
  )


def find_rule(path: str, rules: Iterable[str]) -> str | None:
  """Returns the first rule that matches the path or its end, if any."""
  for rule in rules:
    try:
      if re.fullmatch(rf"(?:.*/)?(?:{rule})", path):
        return rule
    except re.error as error:
      raise ValueError(
        f"rule {rule!r} is no regular expression: {error.msg}"
      ) from None
  return None


def check_rank(rank: int, base: Any) -> None:
  """Raises ValueError unless a matrix of the base's shape can have `rank`."""
  rows, columns = base.in_features, base.out_features
  if not 1 <= rank <= min(rows, columns):
    raise ValueError(
      f"rank {rank} does not fit a matrix of {rows} x {columns}: use 1 to"
      f" {min(rows, columns)}"
    )


def _modules(model) -> Iterator[tuple[tuple, nnx.Module, int | None]]:
  """Yields (path, module, stack size), parents and stacks looked up by path."""
  modules = dict(nnx.iter_modules(model))
  for path, module in modules.items():
    above = (modules.get(path[:depth]) for depth in range(len(path)))
    sizes = (getattr(m, "stack_size", None) for m in above)
    yield path, module, next(filter(None, sizes), None)


def _linear_maps(model) -> Iterator[tuple[str, Any, int | None]]:
  inside = {path for path, module, _ in _modules(model)
            if isinstance(module, Adapter)}  # fmt: skip
  for path, module, size in _modules(model):
    wrapped = any(path[:depth] in inside for depth in range(len(path)))
    if is_linear(module) and not wrapped:
      yield "/".join(map(str, path)), module, size


def _wrap(factory: Factory, base, size: int | None, rngs: nnx.Rngs):
  if size is None:
    return factory(base, rngs=rngs)
  make = nnx.vmap(lambda base, rngs: factory(base, rngs=rngs))
  return nnx.split_rngs(splits=size)(make)(base, rngs)


def _replace(model, path: str, module):
  if not path:
    return module
  *above, last = path.split("/")
  parent = model
  for part in above:
    parent = parent[int(part)] if part.isdigit() else getattr(parent, part)
  if last.isdigit():
    parent[int(last)] = module
  else:
    setattr(parent, last, module)
  return model


def _no_match(rule: str, paths: list[str]) -> ValueError:
  if any(find_rule(path, [rule]) for path in paths):
    return ValueError(
      f"rule {rule!r} has no effect: earlier rules match first"
      " wherever it matches"
    )
  close = difflib.get_close_matches(rule, paths, 5, cutoff=0.0)
  return ValueError(
    f"rule {rule!r} matches no linear map; close paths:"
    f" {', '.join(close) or 'none, the model has no linear map'}"
  )
