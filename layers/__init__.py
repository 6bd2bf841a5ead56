if not __name__.startswith("adaptax."):
  raise ImportError(
    "import adaptax.layers, not layers: a second copy would define every class twice"
  )
