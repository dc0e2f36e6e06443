from labs.lab import main

main("roofline")
