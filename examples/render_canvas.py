"""Draw how a canvas is denoised, as an animated SVG: render_canvas.py [FILE.svg]"""

import sys
from html import escape
from pathlib import Path

from mlx_dgemma import Engine, Step, load
from mlx_dgemma.text.chat import chat_ids

PUZZLE = "4000\n0310\n0430\n0000"
DRAFT, ACCEPTED, NEW = "#161b22 #7d8590", "#1f6feb #ffffff", "#79c0ff #0d1117"
GIVEN, DONE = "#21262d #e6edf3", "#238636 #ffffff"  # of a cell and its text
picture = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 280" width="660">
<style>text{font:600 17px ui-monospace,Menlo,Consolas,monospace;text-anchor:middle}
.note{font-size:13px;font-weight:400;fill:#9198a1;text-anchor:start}</style>
<rect width="660" height="280" rx="14" fill="#0d1117"/>
<text class="note" x="28" y="38">prompt</text><text class="note" x="253" y="38">canvas
</text><text class="note" x="28" y="256">dim: draft, blue: accepted</text>\n"""


def cell(x: int, row: int, text: str, colours: str) -> str:
    label, y = {"\n": "↵", "": "·"}.get(text, escape(text)), 58 + 42 * row
    size, (fill, ink) = 17 if len(label) == 1 else 9.5, colours.split()
    return f"""<rect x="{x}" y="{y}" width="42" height="37" rx="6" fill="{fill}"/><text
x="{x + 21}" y="{y + 24}" fill="{ink}" style="font-size:{size}px">{label}</text>\n"""


def frame(caption: str, tokens: list[int], colours: list[str]) -> str:
    """Five tokens of the answer a line, and beside them those that fill the canvas."""
    drawn = f'<text class="note" x="253" y="256">{caption}</text>\n'
    for at, (token, colour) in enumerate(zip(tokens, colours, strict=True)):
        row, column = divmod(at, 5) if at < 20 else ((at - 20) // 3, (at - 20) % 3 + 5)
        x = 253 + 47 * column + 10 * (column > 4)
        drawn += cell(x, row, tokenizer.decode([token]), colour)
    return drawn


for at, digit in enumerate(PUZZLE.replace("\n", "")):
    picture += cell(28 + 47 * (at % 4), at // 4, digit, GIVEN if digit > "0" else DRAFT)
model, tokenizer = load("sudoku4")
engine = Engine(model)
engine.admit(chat_ids(tokenizer, PUZZLE), model.settings, seed=0)
tokens = engine.running[0].state.canvas.flatten().tolist()
frames = [frame("32 random tokens", tokens, [DRAFT] * 32)]
for event in engine.run():
    if isinstance(event, Step):
        before, tokens = tokens, event.draft.tolist()
        kinds = zip(event.accepted.tolist(), before, tokens, strict=True)
        colours = [(NEW if a != b else ACCEPTED) if ok else DRAFT for ok, a, b in kinds]
        caption = f"step {event.step + 1} · mean entropy {event.mean_entropy:.3f} nats"
        frames.append(frame(caption, tokens, colours))
# the last frame stays for a while, and is what a viewer without animation shows
frames += [frame(f"done in {len(frames) - 1} steps", tokens, [DONE] * 32)] * 3
for at, drawn in enumerate(frames):
    times = f"0;{at / len(frames):.4f};{(at + 1) / len(frames):.4f}"
    picture += f"""<g opacity="{int(drawn is frames[-1])}"><animate values="0;1;0"
attributeName="opacity" calcMode="discrete" keyTimes="{times}" repeatCount="indefinite"
dur="{1.4 * len(frames):.1f}s"/>{drawn}</g>\n"""
Path(*sys.argv[1:] or ["canvas.svg"]).write_text(picture + "</svg>\n", "utf-8")
