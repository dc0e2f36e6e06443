from labs.lab import main

if __name__ == "__main__":
    main("serving")
