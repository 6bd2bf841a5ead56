if not __name__.startswith("adaptax."):
  raise ImportError(
    "import adaptax.research, not research: a second copy would define every class twice"
  )
