if not __name__.startswith("adaptax."):
  raise ImportError(
    "import adaptax.experiments, not experiments: a second copy would define every class twice"
  )
