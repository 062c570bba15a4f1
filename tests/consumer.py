# pyright: strict
"""A program that uses the public names, for type checkers; it is never run."""

from mlx_dgemma import (
    Answer,
    Call,
    Commit,
    Conversation,
    Converted,
    DGemmaError,
    DiffusionGemma,
    Engine,
    Event,
    GenerateOptions,
    LoRA,
    Malformed,
    Part,
    Prefilled,
    Prefix,
    PrefixCache,
    Prompt,
    Result,
    Row,
    Settings,
    SettingsOverrides,
    Step,
    Thought,
    Tokenizer,
    TrainSettings,
    convert,
    evaluate,
    fuse,
    generate,
    load,
    stream_generate,
    train,
)


def show(part: Part) -> str:
    match part:
        case Thought(text) | Answer(text):
            return text
        case Call(name, arguments, id):
            return f"{id}: {name}({', '.join(arguments)})"
        case Malformed(text, why):
            return f"{text} ({why})"


def handle(event: Event) -> str:
    match event:
        case Prefilled():
            return f"{event.encoded} of {event.prompt_tokens}, seed {event.seed}"
        case Step():
            return f"{event.step} of {event.steps}: {event.mean_entropy:.2f} nats"
        case Commit():
            return event.text + "".join(show(part) for part in event.parts)


def answer(model: DiffusionGemma, tokenizer: Tokenizer, prompt: Prompt) -> str:
    options: GenerateOptions = {"seed": 0, "max_tokens": 64, "stop": ["\n"]}
    overrides: SettingsOverrides = {"steps": 12, "eos": [1, 106]}
    settings: Settings = model.settings.replace(**overrides)
    text = generate(model, tokenizer, prompt, verbose=True, **options)
    text += generate(model, tokenizer, prompt, settings=settings, t_max=0.9)
    for event in stream_generate(model, tokenizer, prompt, **options):
        print(event.text, end="", flush=True)
        text += handle(event)
    return text


def talk(model: DiffusionGemma, tokenizer: Tokenizer) -> list[str]:
    conversation = Conversation(model, tokenizer, system="Be brief.", steps=24)
    conversation.thinking = True
    said = [e.text for e in conversation.ask("What is this?", images=["a.png"], seed=0)]
    conversation.rewind()
    conversation.save("talk.cache")
    return [*said, *(str(turn["role"]) for turn in conversation.transcript())]


def many(model: DiffusionGemma) -> int:
    engine, prefix = Engine(model), Prefix(model)
    request: int = engine.admit([2, 3], model.settings, 0, prefix=prefix).request
    cache: PrefixCache = model.make_cache()
    return cache.length + sum(event.request == request for event in engine.run())


def main() -> None:
    written: Converted = convert("google/diffusiongemma", "model", quantize=True)
    train("model", "data", "adapter", lora=LoRA(rank=8), settings=TrainSettings())
    fuse("model", "adapter", "fused")
    try:
        model, tokenizer = load(written.path, adapter_path="adapter")
    except DGemmaError as error:
        raise SystemExit(str(error)) from None
    results: list[Result] = evaluate(model, tokenizer, [Row("1 + 1", "2")])
    print(answer(model, tokenizer, [{"role": "user", "content": "Hello"}]))
    print(results[0].exact, talk(model, tokenizer), many(model))
