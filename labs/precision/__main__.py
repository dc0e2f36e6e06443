from labs.lab import main

main("precision")
