"""`python -m mlx_dgemma.evaluate`"""

from .cli.evaluate import main

if __name__ == "__main__":
    main()
