"""Other people's models: what they are made of, by family, and the way into a model directory of ours and out again.

`families` says what a checkpoint's names mean, `sources` and `gguf` read it a tensor at a time, `vocabulary` its tokenizer and
chat template, and `convert` writes. May import inputs and model; nothing of theirs is ever run.
"""
