from labs.lab import main

main("vectorization")
