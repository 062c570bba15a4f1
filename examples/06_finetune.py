"""Fine-tune on your own JSONL: rows of messages in, an adapter out.

python examples/06_finetune.py [ITERATIONS]
"""

import json
import sys
import tempfile
from pathlib import Path

from mlx_dgemma import LoRA, TrainSettings, generate, load, train

iters = int(sys.argv[1]) if len(sys.argv) > 1 else 60
# one row a line; the last message is what the model shall learn to answer
rows = [
    {
        "messages": [
            {"role": "user", "content": " ".join(str(n))},
            {"role": "assistant", "content": " ".join(str(n)[::-1])},
        ]
    }
    for n in range(100, 1000, 7)
]

with tempfile.TemporaryDirectory() as folder:
    data, adapter = Path(folder) / "data", Path(folder) / "adapter"
    data.mkdir()
    for name, part in (("train", rows[:-8]), ("valid", rows[-8:])):
        text = "\n".join(map(json.dumps, part))
        (data / f"{name}.jsonl").write_text(text + "\n")
    last = train(
        "sudoku4",
        data,
        adapter,
        lora=LoRA(rank=16),
        settings=TrainSettings(
            iters=iters, batch_size=8, learning_rate=4e-3, warmup_steps=5
        ),
        on_event=print,
    )
    assert last is not None
    print(f"validation: {last.denoising:.3f} nats a token")
    print(sorted(path.name for path in adapter.iterdir()))
    for name, adapter_path in (("base", None), ("tuned", adapter)):
        model, tokenizer = load("sudoku4", adapter_path)
        print(name, repr(generate(model, tokenizer, "3 0 7", seed=0)))
