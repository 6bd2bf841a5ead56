if not __name__.startswith("adaptax."):
  raise ImportError(
    "import adaptax.pallas_kernels, not pallas_kernels: a second copy would define every class twice"
  )
