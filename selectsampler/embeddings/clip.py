"""Loading a CLIP model through open_clip, and everything that its features depend on."""

import difflib
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from selectsampler.store import bytes_of, digest_tensors

__all__ = ["Clip", "load_clip", "resolve_device"]

PRECISIONS = {"fp32": None, "amp": torch.float16, "amp_bf16": torch.bfloat16}


@dataclass(frozen=True)
class Clip:
    """A CLIP model with what its features depend on: weights, preprocessing, precision."""

    name: str
    model: Any  # an open_clip model: encode_image, encode_text, logit_scale
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    precision: str
    weights: str  # sha256 of all parameters and buffers
    preprocessing: str  # sha256 of its description and of what it makes of a test image
    quick_gelu: bool  # no parameter tells it from plain GELU

    @property
    def temperature(self) -> float:
        """The model's own temperature, 1 / exp(logit_scale); 0.01 for OpenAI's models."""
        return math.exp(-float(self.model.logit_scale.detach()))

    def identity(self) -> dict[str, Any]:
        """What the cache key and the provenance hold."""
        return {
            "weights": self.weights,
            "preprocessing": self.preprocessing,
            "precision": self.precision,
            "quick_gelu": self.quick_gelu,
        }

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Features (B, D), float32, of their own length, on the CPU."""
        memory_format = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        pixels = pixels.to(self.device, memory_format=memory_format, non_blocking=True)
        with torch.no_grad(), self._autocast():
            return self.model.encode_image(pixels).float().cpu()

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Features (B, D), float32, of unit length, on the CPU."""
        with torch.no_grad(), self._autocast():
            features = self.model.encode_text(tokens.to(self.device)).float()
        return nn.functional.normalize(features, dim=1).cpu()

    def _autocast(self) -> AbstractContextManager:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)


def load_clip(clip: str | Sequence[Any], *, device: str | torch.device = "auto", precision: str | None = None) -> Clip:
    """The model that `clip` names, with weights, in evaluation mode.

    Args:
        clip: `ARCH/TAG` as in `open_clip.list_pretrained()`, `local-dir:PATH`, `hf-hub:ORG/NAME`, or a ready triple
            (model, preprocess, tokenizer).
        device: `auto` takes CUDA, then MPS, then the CPU.
        precision: `fp32`, `amp` (float16 autocast) or `amp_bf16`; by default `amp` on CUDA and `fp32` elsewhere.

    Raises:
        ValueError: for a name that open_clip does not know, or one without weights.
    """
    device = resolve_device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} is not available on this machine: use 'auto' or 'cpu'.")
    precision = precision or ("amp" if device.type == "cuda" else "fp32")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}, but it must be one of {', '.join(PRECISIONS)}.")
    if isinstance(clip, str):
        name = clip
        model, preprocess, tokenizer = _load_open_clip(clip)
    else:
        name = "a model handed over"
        model, preprocess, tokenizer = _ready(clip)
    model = model.to(device).eval()
    return Clip(
        name=name,
        model=model,
        preprocess=preprocess,
        tokenizer=tokenizer,
        device=device,
        precision=precision,
        weights=digest_tensors(model.state_dict()),
        preprocessing=_preprocessing_digest(preprocess),
        quick_gelu=any(type(module).__name__ == "QuickGELU" for module in model.modules()),
    )


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU."""
    if str(device) != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def open_clip_arguments(clip: str) -> dict[str, Any]:
    """The arguments of `open_clip.create_model_from_pretrained` for a name; pure, nothing is loaded.

    Tags such as ViT-B-32/openai were trained with QuickGELU, which the architecture's config does not say: open_clip
    warns of it and goes on with plain GELU. The tag's own config decides here.
    """
    import open_clip

    if clip.startswith(("local-dir:", "hf-hub:")):
        return {"model_name": clip}
    architecture, slash, tag = clip.partition("/")
    known = open_clip.list_models()
    if architecture not in known:
        close = ", ".join(difflib.get_close_matches(architecture, known)) or "see open_clip.list_models()"
        raise ValueError(
            f"open_clip knows no architecture {architecture!r} ({close}). Give clip as ARCH/TAG, local-dir:PATH or "
            "hf-hub:ORG/NAME."
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not slash or tag not in tags:
        raise ValueError(
            f"{clip!r} names no weights, and scores of a model without weights are noise. Weights of {architecture}: "
            f"{', '.join(tags) or 'none'}; your own load as local-dir:PATH."
        )
    quick_gelu = bool(open_clip.get_pretrained_cfg(architecture, tag).get("quick_gelu", False))
    return {"model_name": architecture, "pretrained": tag, "force_quick_gelu": quick_gelu}


def _load_open_clip(clip: str) -> tuple[nn.Module, Callable, Callable]:
    import open_clip

    arguments = open_clip_arguments(clip)
    try:
        model, preprocess = open_clip.create_model_from_pretrained(**arguments, return_transform=True)
        tokenizer = open_clip.get_tokenizer(arguments["model_name"])
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"open_clip could not load {clip!r}. A local-dir: needs open_clip_config.json and "
            f"open_clip_model.safetensors; other names are downloaded once, which needs a network. It says: {error}"
        ) from error
    return model, preprocess, tokenizer


def _ready(clip: Sequence[Any]) -> tuple[nn.Module, Callable, Callable]:
    if not isinstance(clip, Sequence) or len(clip) != 3:
        raise ValueError("clip must be a name or a triple (model, preprocess, tokenizer) as open_clip makes them.")
    model, preprocess, tokenizer = clip
    lacking = [name for name in ("encode_image", "encode_text", "logit_scale") if not hasattr(model, name)]
    if lacking or not callable(preprocess) or not callable(tokenizer):
        problem = f"the model lacks {', '.join(lacking)}" if lacking else "preprocess or tokenizer cannot be called"
        raise ValueError(f"clip is a triple (model, preprocess, tokenizer), but {problem}.")
    return model, preprocess, tokenizer


def _preprocessing_digest(preprocess: Callable[[Image.Image], Tensor]) -> str:
    """What a preprocessing says of itself, and what it does to a test image: two that differ get two caches."""
    row, column = np.mgrid[0:97, 0:89]  # nearly square, else a random crop may have no choice
    pattern = np.stack([row * 2 + column, row * column % 251, (row ^ column) * 3], axis=-1).astype(np.uint8)
    first, *others = (preprocess(Image.fromarray(pattern)) for _ in range(16))  # a flip shows every other time
    if not isinstance(first, Tensor) or first.ndim != 3:
        raise ValueError("CLIP's preprocess must turn a PIL image into a tensor of shape (3, H, W).")
    if not all(torch.equal(first, other) for other in others):
        raise ValueError("preprocess is random: give CLIP's evaluation preprocessing, not the one for training.")
    description = re.sub(r" at 0x[0-9a-f]+", "", repr(preprocess))
    return hashlib.sha256(description.encode() + bytes_of(first)).hexdigest()
