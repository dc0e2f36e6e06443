"""What XLA compiled stays from one test run to the next."""

from contextlib import contextmanager


@contextmanager
def kept_in(folder):
    """JAX looks there before it compiles, under a key that holds all of a program; None: nowhere."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": folder and str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def change(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()  # else it stays as it was when the first program was compiled

    change(settings)
    try:
        yield
    finally:
        change(before)
