"""`python -m mlx_dgemma`"""

from .cli.main import main

if __name__ == "__main__":
    main()
