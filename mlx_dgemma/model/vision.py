"""The Gemma 4 vision tower: patches of an image to soft tokens of the language model.

Formulas follow transformers' `models/gemma4`. Images run one at a time, without padding
or masks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint.vision import LIMITS, ImageTokens, VisionConfig
from ..errors import MediaError, SettingsError
from .attention import RopeTables, attend_all, cos_sin, rotate
from .layers import Linear, geglu


class ClippedLinear(nn.Module):
    """A linear map between optional limits of what goes in and what comes out."""

    def __init__(self, vision: VisionConfig, inputs: int, outputs: int):
        super().__init__()
        self.clipped = vision.clipped
        self.linear = Linear(inputs, outputs, bias=False)
        if self.clipped:
            for limit in LIMITS:
                self[limit] = mx.zeros(())

    def __call__(self, x: mx.array) -> mx.array:
        if not self.clipped:
            return self.linear(x)
        x = mx.clip(x, self.input_min, self.input_max)
        return mx.clip(self.linear(x), self.output_min, self.output_max)


class VisionFeedForward(nn.Module):
    """Gated MLP, (P, D) -> (P, D)."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        width, inner = vision.hidden_size, vision.intermediate_size
        self.gate_proj = ClippedLinear(vision, width, inner)
        self.up_proj = ClippedLinear(vision, width, inner)
        self.down_proj = ClippedLinear(vision, inner, width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class VisionAttention(nn.Module):
    """Every patch sees every other; scale 1; q and k normed with weights, v without."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        width, self.head_dim = vision.hidden_size, vision.head_dim
        queries, keys = (n * self.head_dim for n in (vision.heads, vision.kv_heads))
        self.eps = vision.rms_norm_eps
        self.q_proj = ClippedLinear(vision, width, queries)
        self.k_proj = ClippedLinear(vision, width, keys)
        self.v_proj = ClippedLinear(vision, width, keys)
        self.o_proj = ClippedLinear(vision, queries, width)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=self.eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=self.eps)

    def __call__(self, x: mx.array, rope: tuple[RopeTables, RopeTables]) -> mx.array:
        """(P, D) -> (P, D); rope: tables of the patches' x and of their y."""
        queries = rotate_halves(self.q_norm(self._heads(self.q_proj(x))), rope)
        keys = rotate_halves(self.k_norm(self._heads(self.k_proj(x))), rope)
        values = mx.fast.rms_norm(self._heads(self.v_proj(x)), None, self.eps)
        y = attend_all(queries, keys, values)
        return self.o_proj(y[0].swapaxes(0, 1).flatten(1))

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(len(x), -1, self.head_dim).swapaxes(0, 1)[None]


class VisionLayer(nn.Module):
    """Attention and feed-forward, each between two norms."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        width, eps = vision.hidden_size, vision.rms_norm_eps
        self.self_attn = VisionAttention(vision)
        self.mlp = VisionFeedForward(vision)
        self.input_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(width, eps=eps)
        self.post_feedforward_layernorm = nn.RMSNorm(width, eps=eps)

    def __call__(self, x: mx.array, rope: tuple[RopeTables, RopeTables]) -> mx.array:
        attended = self.self_attn(self.input_layernorm(x), rope)
        x = x + self.post_attention_layernorm(attended)
        fed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(fed)


class PatchEmbedder(nn.Module):
    """Patches of pixels, and where they lie, to (P, D)."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        width = vision.hidden_size
        self.input_proj = Linear(3 * vision.patch**2, width, bias=False)
        self.position_embedding_table = mx.zeros((2, vision.positions, width))

    def __call__(self, patches: mx.array, positions: mx.array) -> mx.array:
        """(P, 3 · patch²) in [0, 1] and (P, 2) x, y -> (P, D)."""
        table = self.position_embedding_table
        scaled = (2 * (patches - 0.5)).astype(table.dtype)
        place = table[0][positions[:, 0]] + table[1][positions[:, 1]]
        return self.input_proj(scaled) + place


class VisionStack(nn.Module):
    """The layers of the tower."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        self.layers = [VisionLayer(vision) for _ in range(vision.layers)]


class VisionTower(nn.Module):
    """Patches to one vector for each square of pooling × pooling of them."""

    def __init__(self, vision: VisionConfig):
        super().__init__()
        self.vision = vision
        self.patch_embedder = PatchEmbedder(vision)
        self.encoder = VisionStack(vision)
        if vision.standardize:
            self.std_bias = mx.zeros((vision.hidden_size,))
            self.std_scale = mx.ones((vision.hidden_size,))

    def __call__(self, patches: np.ndarray, positions: np.ndarray) -> mx.array:
        """(P, 3 · patch²) pixels in [0, 1], rows from the top, and their (P, 2) x and y
        -> (P / pooling², D)."""
        vision, places = self.vision, mx.array(positions.astype(np.int32))
        x = self.patch_embedder(mx.array(patches), places)
        rope = axial_tables(vision, positions)
        for layer in self.encoder.layers:
            x = layer(x, rope)
        width, height = (int(n) + 1 for n in positions.max(axis=0))
        y = pool(x, width, height, vision.pooling) * math.sqrt(vision.hidden_size)
        if vision.standardize:
            y = y - self.std_bias.astype(mx.float32)
            y = y * self.std_scale.astype(mx.float32)
        return y.astype(x.dtype)


class VisionEmbedder(nn.Module):
    """The tower's vectors to embeddings of the language model."""

    def __init__(self, vision: VisionConfig, width: int):
        super().__init__()
        self.eps = vision.rms_norm_eps
        self.embedding_projection = Linear(vision.hidden_size, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.embedding_projection(mx.fast.rms_norm(x, None, self.eps))


class Vision(nn.Module):
    """Tower and projection; parameters are named as on disk."""

    def __init__(self, vision: VisionConfig, width: int):
        super().__init__()
        self.vision_tower = VisionTower(vision)
        self.embed_vision = VisionEmbedder(vision, width)

    def __call__(self, patches: np.ndarray, positions: np.ndarray) -> mx.array:
        """One image's patches and positions -> (n, width) soft tokens."""
        return self.embed_vision(self.vision_tower(patches, positions))


def axial_tables(
    vision: VisionConfig, positions: np.ndarray
) -> tuple[RopeTables, RopeTables]:
    """cos and sin for the x and for the y of (P, 2) positions, each (1, 1, P, pairs).

    A head's first half is rotated by x, its second by y, with the same frequencies:
    theta^(-2i / half) of pair i (`Gemma4VisionRotaryEmbedding`).
    """
    half = vision.head_dim // 2
    steps = np.arange(0, half, 2, dtype=np.float32) / np.float32(half)
    frequencies = (1 / np.float32(vision.rope_theta) ** steps).astype(np.float32)
    x, y = (cos_sin(positions[None, None, :, axis], frequencies) for axis in (0, 1))
    return x, y


def rotate_halves(x: mx.array, rope: tuple[RopeTables, RopeTables]) -> mx.array:
    """Rotate the halves of (1, H, P, head_dim), each by its own axis."""
    halves = zip(mx.split(x, 2, axis=-1), rope, strict=True)
    return mx.concatenate([rotate(half, tables) for half, tables in halves], axis=-1)


def pool(x: mx.array, width: int, height: int, side: int) -> mx.array:
    """Means of squares of side × side patches, (width · height, D) -> float32.

    Rounded to x's dtype before it is float32, as transformers does.
    """
    grid = x.astype(mx.float32).reshape(height // side, side, width // side, side, -1)
    means = mx.sum(grid * (1 / side**2), axis=(1, 3)).flatten(0, 1)
    return means.astype(x.dtype).astype(mx.float32)


class ImageEncoder:
    """A vision tower that is loaded when it is first used; for any thread.

    folder   the checkpoint, where the processor's configuration lies
    """

    def __init__(
        self,
        folder: Path,
        read_tokens: Callable[[], ImageTokens],
        load: Callable[[], Vision],
    ):
        self.folder, self._read_tokens, self._load = folder, read_tokens, load
        self._lock = Lock()
        self._tower: Vision | None = None

    @property
    def tokens(self) -> ImageTokens:
        """The ids that stand for images in a prompt. Raises ConfigError."""
        return self._read_tokens()

    def encode_image(self, patches: np.ndarray, positions: np.ndarray) -> mx.array:
        """One image's patches (P, 3 · patch²) and (P, 2) x, y -> (n, D), evaluated.

        Raises ConfigError or CheckpointError where the tower cannot be read,
        MediaError for an image that it has no positions for.
        """
        with self._lock:
            if self._tower is None:
                self._tower = self._load()
        check_patches(self._tower.vision_tower.vision, patches, positions)
        soft = self._tower(patches, positions)
        mx.eval(soft)
        return soft


def check_patches(
    vision: VisionConfig, patches: np.ndarray, positions: np.ndarray
) -> None:
    """Raise MediaError unless the tower can take an image: MLX checks no index."""
    width, height = (int(n) + 1 for n in positions.max(axis=0))
    if max(width, height) > vision.positions or positions.min() < 0:
        raise MediaError(
            f"the picture has {width} x {height} patches and the vision tower "
            f"{vision.positions} positions a side; make the picture squarer"
        )
    shape = (width * height, 3 * vision.patch**2)
    if patches.shape != shape or width % vision.pooling or height % vision.pooling:
        raise MediaError(
            f"the picture is cut into {list(patches.shape)} numbers for a vision tower "
            f"of patch_size {vision.patch} and pooling_kernel_size {vision.pooling}; "
            "processor_config.json contradicts config.json"
        )


@dataclass(frozen=True)
class Image:
    """Soft tokens in place of the token ids from `start` on, among those given.

    features (n, D), of one image: while encoding they see one another.
    """

    start: int
    features: mx.array

    @property
    def end(self) -> int:
        return self.start + len(self.features)


def embed_images(embedded: mx.array, images: Sequence[Image]) -> mx.array:
    """(1, T, D) embeddings with images in place of some; unchanged without any."""
    if not images:
        return embedded
    rows, count, width = embedded.shape
    parts, done = [], 0
    for image in images:
        fits = done <= image.start < image.end <= count
        if rows > 1 or not fits or image.features.shape[1:] != (width,):
            raise SettingsError(
                f"an image of {image.features.shape} at {image.start} does not fit "
                f"behind {done} of {rows} × {count} tokens of width {width}"
            )
        parts += [embedded[0, done : image.start], image.features]
        done = image.end
    parts.append(embedded[0, done:])
    return mx.concatenate([part.astype(embedded.dtype) for part in parts])[None]
