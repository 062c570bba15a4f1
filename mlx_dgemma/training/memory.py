def check(source, lora, settings, num_layers):
    pass
