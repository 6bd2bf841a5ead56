if not __name__.startswith("adaptax."):
  raise ImportError(
    "import adaptax.optim, not optim: a second copy would define every class twice"
  )
