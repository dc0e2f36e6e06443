from labs.lab import main

main("jax_transforms")
