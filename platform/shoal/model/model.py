"""`Model`: a network with its tokenizer, chat template and router; what `shoal.Model` names."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal import presets
from shoal.config import FULL, Dtype, ModelConfig
from shoal.errors import ConfigError, ContextLengthError, RequestError, ResourceError
from shoal.inputs import media
from shoal.inputs.chat import DEFAULT_TEMPLATE, Encoded
from shoal.inputs.tokenizer import IMG_END_ID, IMG_ID, PATCH_ID, ROW_ID, Tokenizer
from shoal.model import checkpoint, int8
from shoal.model.adapters import Adapter
from shoal.model.net import Net, dequantized
from shoal.model.pieces import in_pieces
from shoal.model.router import Router

IMAGE_IDS = frozenset((IMG_ID, PATCH_ID, ROW_ID, IMG_END_ID))
_INSIDE = IMAGE_IDS - {IMG_ID}  # of an image that began before


class Model:
    """Everything that one model directory holds, ready to run on one device.

    Examples:
        >>> from shoal import Model
        >>> model = Model.from_preset("test", seed=1)
        >>> model.config.exit_names
        {'shallow': 1, 'middle': 2, 'full': 4}
        >>> model.save("my-model")
        >>> Model.load("my-model").config == model.config
        True
        >>> list(model.embed("Where is my order?").shape)  # one vector of the model's width
        [48]
    """

    def __init__(
        self,
        config: ModelConfig,
        net: Net,
        tokenizer: Tokenizer,
        *,
        name: str = "shoal",
        chat_template: str = DEFAULT_TEMPLATE,
        router: Router | None = None,
        source: Mapping[str, Any] | None = None,
        base: str = "",
    ) -> None:
        """`source`: what an open model was imported from; `base` as of `described.base`."""
        self.source, self.base = source, base
        # were channels moved between its weights before rounding (`smooth`)? Then an adapter of its source does not fit
        self.smoothed = source is not None and config.quantization == "w8a8"
        self.config, self.net, self.tokenizer = config, net.eval().requires_grad_(False), tokenizer
        self.name, self.chat_template, self.router = name, chat_template, router

    @classmethod
    def from_preset(cls, name: str, seed: int = 0, dtype: str | torch.dtype = "float32") -> Model:
        """A model of preset `name` with random weights drawn from `seed`, and a byte tokenizer."""
        config = presets.get(name).model
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return cls(config, Net(config).init_(seed).to(kind), Tokenizer.bytes_only(), name=name)

    @classmethod
    def load(
        cls, directory: str | Path, *, verify: bool = False, on_fallback: Callable[[str], None] | None = None
    ) -> Model:
        """The model in a directory; `verify`: hash weights of any size first (up to 2 GB they are hashed anyway).

        An INT8 model is refused on a machine that cannot be trusted with INT8, unless `on_fallback` is given: it is then called
        with the reason, and the weights come as fp32, in four times the memory. Raises CheckpointError naming what is wrong
        with the directory, ResourceError for the machine.
        """
        parts = checkpoint.read(directory, verify=verify)
        smoothed = parts.source is not None and parts.config.quantization == "w8a8"
        if parts.config.quantization == "w8a8":
            try:
                int8.trusted(torch.device("cpu"))
            except ResourceError as error:
                if on_fallback is None:
                    raise
                on_fallback(error.message)
                parts.config = dataclasses.replace(parts.config, quantization="none")
                parts.net = dequantized(parts.net, parts.config)
        made = cls(
            parts.config,
            parts.net,
            parts.tokenizer,
            name=parts.name,
            chat_template=parts.chat_template,
            router=parts.router,
            source=parts.source,
            base=parts.base,
        )
        made.smoothed = smoothed  # in fp32 as well
        return made

    def save(self, directory: str | Path, *, card: str = "") -> None:
        """Write a model directory (written aside, then renamed)."""
        checkpoint.save(
            directory,
            config=self.config,
            state=self.net.state_dict(),
            tokenizer=self.tokenizer,
            name=self.name,
            chat_template=self.chat_template,
            router=self.router,
            source=self.source,
            base=self.base,
            card=card,
        )

    def to(self, device: str | torch.device) -> Model:
        """This model, moved: the network and the router, which reads what the network gives."""
        self.net.to(device)
        if self.router is not None:
            self.router.to(device)
        return self

    def on_gpu(self, dtype: Dtype = "auto") -> Model:
        """This model on the GPU, its weights and activations in `dtype`; auto: bf16, and fp32 where weights are INT8, whose
        scales and norms stay as they are. Norms, softmax, scores of blocks and logits are fp32 in either. Matrices in fp32 are
        multiplied in TF32, in all of this process from now on; but the router's are in fp64 (`Router.forward`). Raises
        ConfigError for another precision than an INT8 model has."""
        rounded = self.config.quantization != "none"
        if rounded and dtype == "bfloat16":
            raise ConfigError("dtype", got=dtype, allowed="auto or float32, where weights are INT8")
        if not rounded and dtype != "float32":
            self.net.to(torch.bfloat16)
        torch.set_float32_matmul_precision("high")
        return self.to("cuda:0")

    @property
    def device(self) -> torch.device:
        return self.net.device

    def forbidden(self) -> Tensor:
        """bool [V]: tokens that are never sampled: ids without a token, and our control tokens but ``<|end|>``."""
        return forbidden(self.tokenizer, self.config.vocab).to(self.device)

    def encode(self, prompt: str | Sequence[int] | Encoded) -> Encoded:
        """`prompt` as ids and images. Raises RequestError (param ``prompt`` or ``images``) when it is empty, holds something
        else than ids of the vocabulary, or images that are none of this model's or do not fill the patch tokens exactly."""
        if isinstance(prompt, str):
            prompt = Encoded(self.tokenizer.prompt(prompt))
        else:
            given = prompt if isinstance(prompt, Encoded) else Encoded(list(prompt))
            prompt = dataclasses.replace(given, ids=[self._id(token) for token in given.ids])
        if not prompt.ids:
            raise RequestError("prompt is empty", param="prompt", do="give at least one token")
        bad = [token for token in prompt.ids if not 0 <= token < self.config.vocab]
        if bad:
            raise RequestError("prompt token id", param="prompt", got=bad[0], allowed=f"0 to {self.config.vocab - 1}")
        for image in prompt.images:
            self._check_image(image)
        places = prompt.ids.count(PATCH_ID) if self.config.image_size else 0
        patches = sum(len(image.values) for image in prompt.images)
        if places != patches:
            raise RequestError(
                "prompt images", param="prompt", got=f"{patches} patches", allowed=f"{places} as in the ids"
            )
        if prompt.images and not _spells(prompt.ids, prompt.images):
            raise RequestError("prompt images", param="prompt", got="patch tokens of another shape than the images'",
                               do="put Patches.tokens() of each image into the ids, in order and in one piece")  # fmt: skip
        return prompt

    def _id(self, token: object) -> int:
        try:
            return operator.index(token)  # type: ignore[arg-type]
        except TypeError as error:
            raise RequestError("prompt token id", param="prompt", got=token, allowed="whole numbers") from error

    def _tokens(self, tokens: Tensor | Sequence[int]) -> Tensor:
        """`tokens` as whole numbers on this model's device, [T] or [B, T]."""
        allowed = "whole numbers [T] or [B, T], at least one"
        try:
            ids = torch.as_tensor(tokens, device=self.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RequestError("tokens", param="tokens", got=str(error), allowed=allowed) from error
        if ids.dim() not in (1, 2) or not ids.numel() or ids.dtype not in (torch.int64, torch.int32):
            got = f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
            raise RequestError("tokens", param="tokens", got=got, allowed=allowed)
        return ids

    def _check_image(self, image: media.Patches) -> None:
        c = self.config
        if not c.image_size:
            raise RequestError("image", param="images", do="leave it out: this model reads text alone")
        side, values = c.image_size // c.patch, image.values
        fits = 1 <= image.rows <= side and 1 <= image.cols <= side
        if not fits or values.dtype != np.uint8 or values.shape != (image.rows * image.cols, c.patch_values):
            got = f"{image.rows}x{image.cols} patches, values {values.dtype} {list(values.shape)}"
            allowed = f"1x1 to {side}x{side} patches of {c.patch_values} uint8 values each (RGB, {c.patch}x{c.patch})"
            raise RequestError("image", param="images", got=got, allowed=allowed)

    @torch.inference_mode()
    def logits(
        self,
        tokens: Tensor | Sequence[int],
        depth: str | int = FULL,
        images: Sequence[media.Patches] | None = None,
        adapter: Adapter | None = None,
    ) -> Tensor:
        """Logits [B, T, V] (or [T, V] for one row) at `depth`, an exit's name or its layers.

        `images` fill the patch tokens in order, row after row, each within a row. Raises RequestError for tokens or images that
        are not this model's (see `encode`), ContextLengthError beyond the context, ConfigError for a depth that is no exit.
        """
        ids = self._tokens(tokens)
        rows = ids if ids.dim() == 2 else ids[None]
        layers = self.config.depth(depth)
        if rows.shape[1] > self.config.context:
            raise ContextLengthError(
                "tokens", param="tokens", got=rows.shape[1], allowed=f"at most {self.config.context}"
            )
        given = self.encode(Encoded(rows.flatten().tolist(), list(images or ())))
        if images and not _INSIDE.isdisjoint(rows[:, 0].tolist()):
            raise RequestError("prompt images", param="prompt", got="an image that goes on in the next row",
                               do="put Patches.tokens() of each image into one row")  # fmt: skip
        hidden = self.net(rows, *self._placed(given.images, rows), exits=(layers,), adapter=adapter)[layers]
        out = self.net.head(hidden, layers)
        return out if ids.dim() == 2 else out[0]

    def _placed(self, images: Sequence[media.Patches], rows: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The patches of `images` and their row and column, as `Net` takes them, for ids `rows` [B, T]."""
        if not images:
            return None, None
        patches = np.concatenate([image.values for image in images])
        grid = np.concatenate([media.grid(row) for row in rows.cpu().numpy()])
        return torch.from_numpy(patches).to(self.device), torch.from_numpy(grid).to(self.device)

    @torch.inference_mode()
    def embed(self, prompt: str | Sequence[int], depth: str | int = FULL, adapter: Adapter | None = None) -> Tensor:
        """`prompt` as one vector [D] of length 1: the mean over its tokens of the normed hidden states at `depth`. Raises as
        `logits`."""
        layers, ids, placed = self._pooled_at(prompt, depth)
        hidden = self.net(ids[None], *placed, exits=(layers,), adapter=adapter)[layers][0]
        pooled: Tensor = self.net.exit(hidden, layers).float().mean(0)
        return torch.nn.functional.normalize(pooled, dim=0)

    @torch.inference_mode()
    def embed_in_pieces(
        self, rows: int, prompt: str | Sequence[int], depth: str | int = FULL, adapter: Adapter | None = None
    ) -> Generator[None, None, Tensor]:
        """As `embed`, at most `rows` tokens at a time: yields after each piece but the last."""
        layers, ids, placed = self._pooled_at(prompt, depth)
        total = torch.zeros(self.config.width, device=self.device)
        pieces = in_pieces(self.net, self.net.embed_inputs(ids, *placed), layers, rows, adapter)
        for piece, hidden in enumerate(pieces):
            if piece:
                yield
            total += self.net.exit(hidden, layers).float().sum(0)
        return torch.nn.functional.normalize(total, dim=0)

    def _pooled_at(
        self, prompt: str | Sequence[int], depth: str | int
    ) -> tuple[int, Tensor, tuple[Tensor, Tensor] | tuple[None, None]]:
        """The layers of `depth`, and ids [T] and images of `prompt`, as `Net` takes them."""
        given = self.encode(prompt)
        if len(given.ids) > self.config.context:
            raise ContextLengthError(
                "input", param="input", got=len(given.ids), allowed=f"at most {self.config.context} tokens"
            )
        layers, ids = self.config.depth(depth), self._tokens(given.ids)
        return layers, ids, self._placed(given.images, ids[None])

    def generate_naive(
        self,
        prompt: str | Sequence[int] | Encoded,
        max_tokens: int = 16,
        depth: str | int = FULL,
        ignore_eos: bool = False,
    ) -> list[int]:
        """Greedy continuation without cache or batching: the oracle that the engine is held against, for ever."""
        encoded = self.encode(prompt)
        forbidden = self.forbidden()
        ids, answer = list(encoded.ids), list[int]()
        for _ in range(max_tokens):
            scores = self.logits(ids, depth, encoded.images)[-1].masked_fill(forbidden, -torch.inf)
            token = int(scores.argmax())
            if token in self.tokenizer.ends and not ignore_eos:
                break
            ids.append(token)
            answer.append(token)
        return answer

    def quantized(self, rows: Sequence[Sequence[int]] = ()) -> Model:
        """The INT8 twin of this model: weights rounded as they are, and no router, since this one's bounds would not hold.
        With `rows` of ids, the weights are smoothed first by what the network makes of these (`smooth`), and the head is no
        longer tied."""
        from shoal.model import smooth
        from shoal.model.linears import export_int8

        state, config = self.net.state_dict(), dataclasses.replace(self.config, quantization="w8a8")
        if rows:
            seen = smooth.largest(self.net, [self._tokens(row) for row in rows])
            state, config = (
                smooth.smoothed(state, smooth.factors(self.net, seen)),
                dataclasses.replace(config, tied=False),
            )
        with torch.device("meta"):
            net = Net(config)
        state = {name: t.float() if t.is_floating_point() else t for name, t in export_int8(self.net, state).items()}
        net.load_state_dict(state, assign=True)
        return Model(
            config,
            net,
            self.tokenizer,
            name=f"{self.name}-int8",
            chat_template=self.chat_template,
            source=self.source,
            base=self.base,
        )


def forbidden(tokenizer: Tokenizer, vocab: int) -> Tensor:
    """As `Model.forbidden`, for ids below `vocab`."""
    mask = torch.ones(vocab, dtype=torch.bool)
    mask[torch.as_tensor(tokenizer.sayable)] = False
    return mask


def _spells(ids: Sequence[int], images: Sequence[media.Patches]) -> bool:
    """Are the image tokens among `ids` those of `images`, in order, and each image's side by side? A patch that others do not
    stand beside would take another one's column."""
    spans = [token for image in images for token in image.tokens()]
    torn = any(token in _INSIDE and before not in IMAGE_IDS for before, token in pairwise(ids))
    return not torn and [token for token in ids if token in IMAGE_IDS] == spans
