from labs.lab import main

main("programming_models")
