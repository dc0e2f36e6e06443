from labs.lab import main

main("attention")
