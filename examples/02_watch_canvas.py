"""See every draft of the canvas, and how sure the model is of it.

python examples/02_watch_canvas.py
"""

from mlx_dgemma import Commit, Prefilled, Step, load, stream_generate

PUZZLE = "4000\n0310\n0430\n0000"

model, tokenizer = load("sudoku4")
for event in stream_generate(model, tokenizer, PUZZLE, seed=0):
    match event:
        case Prefilled():
            print(f"{event.prompt_tokens} tokens read, seed {event.seed}")
        case Step():
            draft = tokenizer.decode(event.draft.tolist()).replace("\n", " ")
            accepted = event.accepted.sum().item()
            print(
                f"step {event.step + 1}: {draft}   "
                f"{accepted} accepted, {event.mean_entropy:.3f} nats"
            )
        case Commit():
            print(f"done after {event.steps} steps ({event.finish_reason}):")
            print(event.text)
