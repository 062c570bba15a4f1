"""Ways to compute less of a canvas that can change its text; none is on by default.

`trim` and `freeze` act between two steps, on what the host has seen of the first.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from ..model.language import View
from .canvas import Canvas, Frozen, Taken
from .events import Step
from .step import State

ROUND = 16  # trimmed canvases have a multiple of this many tokens
FEWEST = 8  # positions worth freezing at once


def trim(canvas: Canvas, step: Step) -> None:
    """Cut what lies behind the first accepted eos off the canvas.

    The committed canvas is shorter then. Should its eos vanish again, the next canvas
    begins where this one ends.
    """
    tokens, accepted = np.array(step.canvas), np.array(step.accepted)
    ends = np.flatnonzero(accepted & np.isin(tokens, sorted(canvas.settings.eos)))
    if not len(ends) or canvas.frozen is not None:
        return
    length = -(-(int(ends[0]) + 1) // ROUND) * ROUND
    if length < len(tokens):
        state = canvas.state.row(canvas.row)
        canvas.state, canvas.row = state.at(slice(0, length)), 0
        canvas.draft = None


def freeze(canvas: Canvas, taken: Taken, step: Step, view: View) -> Step:
    """Leave out of the next steps what is sure; the step as of the whole canvas.

    view is what the positions of this step saw.

    A position is sure when it was accepted, its token is the draft's of this step and
    the last, and its entropy is below `confidence`. When the rest is done, or one step
    is left, the next step is of the whole canvas again, and so are all that follow.
    """
    before, shown = canvas.draft, _whole(canvas, step)
    canvas.draft = draft = np.array(shown.draft)
    signal = taken.state.signal[taken.row]
    if canvas.frozen is not None:
        signal = _put(canvas.frozen.signal, canvas.frozen.active, signal)
    if canvas.frozen is not None and (
        step.stopped or canvas.step + 1 >= canvas.settings.steps
    ):
        tokens = mx.array(draft)
        first = State.first(tokens, signal.shape[1], signal.dtype)
        canvas.state = replace(first, signal=signal[None], draft=tokens[None])
        canvas.row, canvas.frozen, canvas.thawed = 0, None, True
        return replace(shown, stopped=False)
    if shown.last or canvas.thawed or before is None:
        return shown
    active = np.arange(len(draft)) if canvas.frozen is None else canvas.frozen.active
    sure = np.array(step.accepted) & (np.array(step.canvas) == draft[active])
    sure &= (draft == before)[active]
    sure &= np.array(step.entropy) < canvas.settings.confidence
    if sure.sum() >= FEWEST and not sure.all():
        canvas.frozen = Frozen(
            active=active[~sure],
            draft=draft,
            signal=signal,
            view=_narrowed(view, taken, np.flatnonzero(sure), np.flatnonzero(~sure)),
        )
        rest = mx.array(np.flatnonzero(~sure).astype(np.int32))
        canvas.state, canvas.row = canvas.state.row(canvas.row).at(rest), 0
    return shown


def _whole(canvas: Canvas, step: Step) -> Step:
    """A step of the active positions as one of the whole canvas."""
    if canvas.frozen is None:
        return step
    frozen = canvas.frozen

    def put(values: np.ndarray, part: mx.array) -> mx.array:
        values[frozen.active] = np.array(part)
        return mx.array(values)

    size = len(frozen.draft)
    whole = replace(
        step,
        draft=put(frozen.draft.copy(), step.draft),
        canvas=put(frozen.draft.copy(), step.canvas),
        accepted=put(np.ones(size, bool), step.accepted),
        entropy=put(np.zeros(size, np.float32), step.entropy),
    )
    mx.eval(whole.draft, whole.canvas, whole.accepted, whole.entropy)
    return whole


def _put(whole: mx.array, active: np.ndarray, part: mx.array) -> mx.array:
    """`whole` with its active rows replaced."""
    result = mx.array(whole)  # a copy: assignment changes its left side
    result[mx.array(active.astype(np.int32))] = part
    return result


def _narrowed(view: View, taken: Taken, sure: np.ndarray, rest: np.ndarray) -> View:
    """What the rest of a canvas sees: the sure positions have joined the prefix."""
    gone, left = (mx.array(a.astype(np.int32)) for a in (sure, rest))
    prefixes, turns = [], []
    for prefix, own, tables, whole in zip(
        view.prefixes, taken.outcome.kept, view.tables, view.turns, strict=True
    ):
        fixed = tuple(array[:, :, gone] for array in own)
        if prefix:
            pairs = zip(prefix, fixed, strict=True)
            fixed = tuple(mx.concatenate([a, b], axis=2) for a, b in pairs)
        prefixes.append(fixed)
        before = whole[0].shape[2] - tables[0].shape[2]
        turns.append(
            tuple(
                mx.concatenate([a[:, :, :before], b[:, :, gone], b[:, :, left]], axis=2)
                for a, b in zip(whole, tables, strict=True)
            )
        )
    tables = [(cos[:, :, left], sin[:, :, left]) for cos, sin in view.tables]
    return View(prefixes, tables, turns, [None] * len(prefixes))
