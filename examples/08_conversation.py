"""Talk: a turn that is taken back and asked again has nothing left to encode."""

from mlx_dgemma import Commit, Conversation, load

model, tokenizer = load("sudoku4")
talk = Conversation(model, tokenizer)
for seed in (0, 1):
    for event in talk.ask("4000\n0310\n0430\n0000", seed=seed):
        if isinstance(event, Commit):
            print(event.text)
    assert talk.stats is not None
    print(f"{talk.stats.encoded} of {talk.stats.prompt_tokens} tokens encoded")
    talk.rewind()
