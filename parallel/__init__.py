if not __name__.startswith("adaptax."):
  raise ImportError(
    "import adaptax.parallel, not parallel: a second copy would define every class twice"
  )
