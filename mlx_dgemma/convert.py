"""`python -m mlx_dgemma.convert`"""

from .cli.convert import main

if __name__ == "__main__":
    main()
