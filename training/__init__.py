"""Code that the stage scripts share: arguments, trained parts of each stage, loading, checks, callbacks, sharing."""

if __name__ != "jnana.training":  # a second copy of every class would be registered
    raise ImportError(f"{__name__!r} is part of the package jnana; import jnana.training instead")
