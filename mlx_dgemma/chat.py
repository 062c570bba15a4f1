"""`python -m mlx_dgemma.chat`"""

from .cli.chat import main

if __name__ == "__main__":
    main()
