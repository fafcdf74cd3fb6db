"""Images through vLLM's multimodal registry: a prompt's ``<img>`` becomes the span of the image's patches.

An image is cut as everywhere else (`inputs.media`), so the tokens and values are those of our own engine. vLLM hashes the image
into the keys of its prefix cache: two images never share a page.

Letters: n patches, V numbers in a patch, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

from shoal.config import ModelConfig
from shoal.inputs import media
from shoal.inputs.tokenizer import IMG, IMG_END_ID, IMG_ID, PATCH_ID, ROW_ID


class Info(BaseProcessingInfo):  # type: ignore[misc]
    @property
    def shape(self) -> ModelConfig:
        return self.ctx.model_config.hf_config.shape

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}  # as many as fit the context


class Largest(BaseDummyInputsBuilder[Info]):  # type: ignore[misc]
    """What vLLM measures memory with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMG * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        size = self.info.shape.image_size
        return {"image": [Image.new("RGB", (size, size))] * mm_counts.get("image", 0)}


class Processor(BaseMultiModalProcessor[Info]):  # type: ignore[misc]
    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        shape = self.info.shape
        cut = [media.to_patches(media.as_rgb(image), shape) for image in hf_data["images"]]
        return BatchFeature(
            {
                "patches": torch.from_numpy(np.concatenate([image.values for image in cut])),
                "grid": torch.from_numpy(np.concatenate([media.grid(image.tokens()) for image in cut])),
                "size": torch.tensor([[image.rows, image.cols] for image in cut]),
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        patches = hf_inputs["size"].prod(-1) if "size" in hf_inputs else torch.empty(0, dtype=torch.long)
        flat = MultiModalFieldConfig.flat_from_sizes("image", patches)
        return {"patches": flat, "grid": flat, "size": MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        def span(index: int) -> PromptUpdateDetails:
            rows, cols = out_mm_kwargs["image"][index]["size"].data.tolist()
            tokens = media.Patches(np.empty(0), rows, cols).tokens()
            return PromptUpdateDetails.select_token_id(tokens, PATCH_ID)

        return [PromptReplacement(modality="image", target=[IMG_ID], replacement=span)]


def as_image(patches: media.Patches, config: ModelConfig) -> Image.Image:
    """The picture that `media.to_patches` cuts into exactly `patches`: for a prompt that was cut already."""
    p = config.patch
    cells = patches.values.reshape(patches.rows, patches.cols, p, p, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(np.ascontiguousarray(cells.reshape(patches.rows * p, patches.cols * p, 3)))


def collapsed(ids: Sequence[int]) -> list[int]:
    """`ids` with each image's span as its ``<img>`` alone, which is how vLLM is asked."""
    return [token for token in ids if token not in (PATCH_ID, ROW_ID, IMG_END_ID)]
