"""`python -m mlx_dgemma.fuse`"""

from .cli.fuse import main

if __name__ == "__main__":
    main()
