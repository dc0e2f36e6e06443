from labs.lab import main

main("collectives")
