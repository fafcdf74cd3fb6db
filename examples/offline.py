"""Many prompts in one batch, without a server: python examples/offline.py MODEL_DIRECTORY"""

import sys

from shoal import Engine, Model, Request, Sampling

PROMPTS = ["def add(a, b):", "Where is my order?", "Once upon a time"]


def main() -> None:
    engine = Engine(Model.load(sys.argv[1]))
    sampling = Sampling(max_tokens=24, temperature=0)
    answers = engine.generate([Request(prompt, sampling) for prompt in PROMPTS])
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        print(f"{prompt!r} -> {answer.text!r}  ({len(answer.tokens)} tokens, {answer.depth} layers)")


if __name__ == "__main__":
    main()
