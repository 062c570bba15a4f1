"""`python -m mlx_dgemma.generate`"""

from .cli.generate import main

if __name__ == "__main__":
    main()
