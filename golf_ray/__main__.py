"""`python -m golf_ray`: the command line without its console script."""

from golf_ray.cli import main

if __name__ == "__main__":
    main()
