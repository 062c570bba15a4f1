"""What the events of a request say, for comparisons bit for bit."""

from mlx_dgemma import Commit, Step


def exactly(events) -> list[tuple]:
    """Each step, its entropies last, and each commit, its text last."""
    return [
        (e.draft.tolist(), e.canvas.tolist(), e.accepted.tolist(), e.entropy.tolist())
        if isinstance(e, Step)
        else (e.tokens, e.steps, e.finish_reason, e.text)
        for e in events
        if isinstance(e, Step | Commit)
    ]
