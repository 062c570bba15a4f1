# pyright: strict
"""A program that uses the public names, for type checkers; it is never run."""

import mlx_dgemma as dg


def show(part: dg.Part) -> str:
    match part:
        case dg.Thought(text) | dg.Answer(text):
            return text
        case dg.Call(name, arguments, id):
            return f"{id}: {name}({', '.join(arguments)})"
        case dg.Malformed(text, why):
            return f"{text} ({why})"


def handle(event: dg.Event) -> str:
    match event:
        case dg.Prefilled():
            return f"{event.encoded} of {event.prompt_tokens}, seed {event.seed}"
        case dg.Step():
            return f"{event.step} of {event.steps}: {event.mean_entropy:.2f} nats"
        case dg.Commit():
            return event.text + "".join(show(part) for part in event.parts)


def answer(model: dg.DiffusionGemma, tokenizer: dg.Tokenizer, prompt: dg.Prompt) -> str:
    options: dg.GenerateOptions = {"seed": 0, "max_tokens": 64, "stop": ["\n"]}
    overrides: dg.SettingsOverrides = {"steps": 12, "eos": [1, 106]}
    settings: dg.Settings = model.settings.replace(**overrides)
    text = dg.generate(model, tokenizer, prompt, verbose=True, **options)
    text += dg.generate(model, tokenizer, prompt, settings=settings, t_max=0.9)
    for event in dg.stream_generate(model, tokenizer, prompt, **options):
        print(event.text, end="", flush=True)
        text += handle(event)
    return text


def talk(model: dg.DiffusionGemma, tokenizer: dg.Tokenizer) -> list[str]:
    conversation = dg.Conversation(model, tokenizer, system="Be brief.", steps=24)
    conversation.thinking = True
    said = [e.text for e in conversation.ask("What is this?", images=["a.png"], seed=0)]
    conversation.rewind()
    conversation.save("talk.cache")
    return [*said, *(str(turn["role"]) for turn in conversation.transcript())]


def many(model: dg.DiffusionGemma) -> int:
    engine, prefix = dg.Engine(model), dg.Prefix(model)
    request: int = engine.admit([2, 3], model.settings, 0, prefix=prefix).request
    cache: dg.PrefixCache = model.make_cache()
    return cache.length + sum(event.request == request for event in engine.run())


def main() -> None:
    written: dg.Converted = dg.convert("google/diffusiongemma", "model", quantize=True)
    dg.train(
        "model", "data", "adapter", lora=dg.LoRA(rank=8), settings=dg.TrainSettings()
    )
    dg.fuse("model", "adapter", "fused")
    try:
        model, tokenizer = dg.load(written.path, adapter_path="adapter")
    except dg.DGemmaError as error:
        raise SystemExit(str(error)) from None
    results: list[dg.Result] = dg.evaluate(model, tokenizer, [dg.Row("1 + 1", "2")])
    print(answer(model, tokenizer, [{"role": "user", "content": "Hello"}]))
    print(results[0].exact, talk(model, tokenizer), many(model))
