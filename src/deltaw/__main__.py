"""`python -m deltaw`: the program, where its folder is not on the path."""

from deltaw.cli.main import main

if __name__ == "__main__":
    main()
