"""The sampler's settings as options: of every command that denoises."""

import click

SETTINGS = [
    click.option(
        "--min-tokens",
        type=click.IntRange(0),
        help="Tokens before which the text may not end; 1: no empty answers.",
    ),
    click.option(
        "--canvas-length", type=click.IntRange(1, 65536), help="Tokens per canvas."
    ),
    click.option("--steps", type=click.IntRange(1), help="Most steps per canvas."),
    click.option(
        "--entropy-bound",
        type=click.FloatRange(0, min_open=True),
        help="Nats of uncertainty accepted per step.",
    ),
    click.option(
        "--t-max", type=click.FloatRange(0, min_open=True), help="First temperature."
    ),
    click.option("--t-min", type=click.FloatRange(0), help="Last temperature."),
    click.option(
        "--stability",
        type=click.IntRange(0),
        help="Equal drafts in a row before a canvas is done.",
    ),
    click.option(
        "--confidence",
        type=click.FloatRange(0),
        help="Mean entropy, in nats, below which a stable canvas is done.",
    ),
    click.option(
        "--sampler",
        type=click.Choice(["entropy-bound", "confidence"]),
        help="confidence: reveal likely tokens for good.",
    ),
    click.option(
        "--min-probability",
        type=click.FloatRange(0),
        help="How likely a token is that --sampler confidence reveals.",
    ),
]


def settings_options(max_tokens: int | None = None):
    """The sampler's settings; each defaults to what the checkpoint says.

    max_tokens  a default of the command's own
    """
    most = click.option(
        "--max-tokens",
        "-m",
        type=click.IntRange(1),
        default=max_tokens,
        show_default=max_tokens is not None,
        help="Most tokens.",
    )

    def add(command):
        for option in reversed([most, *SETTINGS]):
            command = option(command)
        return command

    return add
