"""`python -m mlx_dgemma.lora`: see `mlx_dgemma.cli.lora`."""

from .cli.lora import main

if __name__ == "__main__":
    main()
