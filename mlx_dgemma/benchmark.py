"""`python -m mlx_dgemma.benchmark`"""

from .cli.benchmark import main

if __name__ == "__main__":
    main()
