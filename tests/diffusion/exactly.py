"""What the events of a request say, for comparisons bit for bit."""

import numpy as np

from mlx_dgemma import Commit, Step


def exactly(events) -> list:
    """All numbers of all steps, and what the commits say."""
    return [
        (*(np.array(a).tolist() for a in (e.draft, e.canvas, e.accepted, e.entropy)),)
        if isinstance(e, Step)
        else (e.tokens, e.text, e.steps, e.finish_reason)
        for e in events
        if isinstance(e, Step | Commit)
    ]
