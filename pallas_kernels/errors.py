"""One way to say that a name is not among those allowed.

It stands here because this is the folder that all others may import.
"""

import difflib
from collections.abc import Iterable


def unknown_name(kind: str, name: str, allowed: Iterable[str]) -> ValueError:
  """Returns a one-line error that names the value and the nearest valid one.

  Args:
    kind: what the name stands for, such as `optimizer`.
    name: the value that was given.
    allowed: the valid names.
  """
  allowed = list(allowed)
  close = difflib.get_close_matches(name, allowed, 1, cutoff=0.5)
  hint = f": did you mean {close[0]}?" if close else ""
  return ValueError(
    f"unknown {kind} {name!r}{hint} (allowed: {', '.join(allowed)})"
  )
