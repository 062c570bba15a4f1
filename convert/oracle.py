"""transformers' DiffusionGemma behind the calls of our model, on torch.

The reference of verify.py, export_golden.py and the parity tests. Needs the extra
`parity`.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np

try:
    import torch
except ModuleNotFoundError:
    raise SystemExit("torch is missing; pip install -e '.[cpu,dev,parity]'") from None
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DynamicCache,
    Gemma4VisionConfig,
)
from transformers.models.diffusion_gemma import generation_diffusion_gemma as sampling
from transformers.utils import logging

# the argument that takes the cache; transformers before 5.24: `past_key_values`
_ARGUMENTS = inspect.signature(DiffusionGemmaForBlockDiffusion.forward).parameters
CACHE = "cache" if "cache" in _ARGUMENTS else "past_key_values"


def load_oracle(path: Path, dtype: str = "float32") -> "Oracle":
    """Load a Hugging Face folder into transformers, computing in `dtype`."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    raw = json.loads((path / "config.json").read_text())
    if raw.get("vision_config") is None:
        # transformers would build its default tower of 168 M parameters
        raw["vision_config"] = Gemma4VisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=16
        ).to_dict()
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(
        path,
        config=DiffusionGemmaConfig.from_dict(raw),
        dtype=dtype,
        # the only expert implementation that supports float64
        experts_implementation="eager",
    )
    return Oracle(model.eval())


@dataclass
class RecordedStep:
    """One denoising step of one row, as transformers computed it."""

    canvas: np.ndarray  # (L,) its input
    logits: np.ndarray  # (L, V)
    proposal: np.ndarray  # (L,)
    noise: np.ndarray  # (L,)
    entropy: np.ndarray  # (L,)
    accepted: np.ndarray  # (L,) bool
    argmax: np.ndarray  # (L,)
    stopped: bool


@dataclass
class Trajectory:
    """One `generate` of transformers with all its random draws."""

    prompt: list[int]
    temperatures: list[float]  # of step 0, 1, …
    starts: list[np.ndarray] = field(default_factory=list)  # first canvases
    canvases: list[list[RecordedStep]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # all committed canvases

    @property
    def steps(self) -> list[RecordedStep]:
        return [step for canvas in self.canvases for step in canvas]


def stacked(steps: list[RecordedStep]) -> dict[str, np.ndarray]:
    """Return each field of the steps as one (steps, …) array."""
    rows = [asdict(step) for step in steps]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Oracle:
    """transformers' model; arrays in and out are numpy."""

    def __init__(self, model: DiffusionGemmaForBlockDiffusion):
        self.model = model
        self.config = model.config
        self.image_token_id = model.config.image_token_id
        # before 5.24 an image token without its picture was embedded as padding
        model.config.image_token_id = -1

    def floats(self, array: np.ndarray) -> torch.Tensor:
        """Return an array in the dtype of the model."""
        return torch.tensor(array, dtype=self.model.lm_head.weight.dtype)

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.config.get_text_config(decoder=True))

    @torch.no_grad()
    def encode(
        self, tokens: np.ndarray, cache: DynamicCache | None = None
    ) -> tuple[np.ndarray, DynamicCache]:
        """Encode (B, T) ids; return the (B, T, D) last hidden state and the cache."""
        cache = self.new_cache() if cache is None else cache
        ids = torch.tensor(tokens)
        output = self.model.model.encoder(input_ids=ids, **{CACHE: cache})
        return to_numpy(output.last_hidden_state), cache

    @torch.no_grad()
    def encode_images(
        self, tokens: np.ndarray, pixels: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, DynamicCache]:
        """Encode (1, T) ids with n images as a first prompt.

        pixels (n, P, 3 · patch²) and positions (n, P, 2), padded with -1, come from
        the image processor. Returns the (m, D) soft tokens, the (1, T, D) last hidden
        state and the cache. Masks are made as in `generate`: the encoder itself makes
        none for images.
        """
        with mock.patch.object(self.config, "image_token_id", self.image_token_id):
            return self._encode_images(tokens, pixels, positions)

    def _encode_images(self, tokens, pixels, positions):
        encoder, cache = self.model.model.encoder, self.new_cache()
        ids, placed = torch.tensor(tokens), torch.tensor(positions)
        patches = self.floats(pixels)
        masks = encoder.create_masks_for_generate(
            config=self.config,
            inputs_embeds=patches.new_empty((*ids.shape, 0)),
            attention_mask=None,
            position_ids=torch.arange(ids.shape[1])[None],
            mm_token_type_ids=(ids == self.config.image_token_id).int(),
            **{CACHE: cache},
        )
        soft = encoder.get_image_features(patches, placed, return_dict=True)
        output = encoder(
            input_ids=ids,
            attention_mask=masks,
            pixel_values=patches,
            image_position_ids=placed,
            **{CACHE: cache},
        )
        hidden = to_numpy(output.last_hidden_state)
        return to_numpy(soft.pooler_output), hidden, cache

    @torch.no_grad()
    def denoise(
        self,
        canvas: np.ndarray,
        cache: DynamicCache,
        processed_logits: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return (B, L, V) logits of (B, L) ids, conditioned on a step's logits."""
        signal = None
        if processed_logits is not None:
            signal = self.floats(processed_logits)
        output = self.model(
            decoder_input_ids=torch.tensor(canvas),
            self_conditioning_logits=signal,
            **{CACHE: cache},
        )
        return to_numpy(output.logits)

    @contextmanager
    def watch_routing(self) -> Iterator[list[np.ndarray]]:
        """Record how clearly the passes inside route their tokens, per layer.

        Each (N,) array holds the relative gap between the last chosen expert and the
        next of N tokens; a rounding error larger than that sends the token elsewhere.
        """
        gaps: list[np.ndarray] = []
        top = self.config.text_config.top_k_experts

        def record(module, inputs, outputs) -> None:
            ranked = outputs[0].detach().sort(dim=-1, descending=True).values
            if top < ranked.shape[-1]:
                gaps.append(to_numpy(1 - ranked[:, top] / ranked[:, top - 1]))

        stacks = (self.model.model.encoder.language_model, self.model.model.decoder)
        routers = [layer.router for stack in stacks for layer in stack.layers]
        hooks = [router.register_forward_hook(record) for router in routers]
        try:
            yield gaps
        finally:
            for hook in hooks:
                hook.remove()

    def routing_margins(
        self,
        canvas: np.ndarray,
        cache: DynamicCache,
        processed_logits: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return each token's smallest gap (B, L) over the layers of one pass."""
        with self.watch_routing() as gaps:
            self.denoise(canvas, cache, processed_logits)
        if not gaps:
            return np.ones(canvas.shape)
        return np.min(gaps, axis=0).reshape(canvas.shape)

    @torch.no_grad()
    def router(self, layer: int, residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (N, E) probabilities and (N, k) sorted choices of (N, D) residuals."""
        router = self.model.model.decoder.layers[layer].router
        probabilities, _, indices = router(self.floats(residual))
        return to_numpy(probabilities), np.sort(indices.numpy(), axis=-1)

    def generate(self, prompt: list[int], seed: int, **settings) -> Trajectory:
        """Run one row through transformers' `generate` and record every draw."""
        torch.manual_seed(seed)
        config, _ = self.model._prepare_generation_config(None, **settings)
        steps, low, high = config.max_denoising_steps, config.t_min, config.t_max
        temperatures = [low + (high - low) * n / steps for n in range(steps, 0, -1)]
        trajectory = Trajectory(prompt, temperatures)
        with _recording(self.model, trajectory):
            output = self.model.generate(torch.tensor([prompt]), **settings)
        trajectory.tokens = output.sequences[0, len(prompt) :].tolist()
        return trajectory


@contextmanager
def _recording(model, trajectory: Trajectory) -> Iterator[None]:
    """Record what transformers' sampler sees and decides, without changing it."""
    sampler = sampling.EntropyBoundSampler
    criteria = sampling.StableAndConfidentStoppingCriteria
    forward, multinomial = model.forward, torch.multinomial
    new, accept = sampler.initialize_canvas, sampler.accept_canvas
    stop = criteria.__call__
    step: dict[str, np.ndarray] = {}

    def on_new(self, batch_size, device):
        canvas = new(self, batch_size, device)
        if "proposal" in step:  # inside renoise: the canvas is noise
            step["noise"] = canvas[0].numpy()
        else:
            trajectory.starts.append(canvas[0].numpy())
            trajectory.canvases.append([])
        return canvas

    def on_forward(*args, **kwargs):
        output = forward(*args, **kwargs)
        step["canvas"] = kwargs["decoder_input_ids"][0].numpy().copy()
        step["logits"] = to_numpy(output.logits[0])
        return output

    def on_multinomial(probabilities, num_samples):
        drawn = multinomial(probabilities, num_samples=num_samples)
        step["proposal"] = drawn[:, 0].numpy()
        return drawn

    def on_accept(self, current, proposed, logits, cur_step):
        canvas = accept(self, current, proposed, logits, cur_step)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        step["entropy"] = to_numpy(entropy[0])
        step["accepted"] = self.accepted_token_mask[0].numpy()
        return canvas

    def on_stop(self, argmax_canvas, logits, **kwargs):
        stopped = stop(self, argmax_canvas, logits, **kwargs)
        argmax = argmax_canvas[0].numpy()
        recorded = RecordedStep(**step, argmax=argmax, stopped=bool(stopped[0]))
        trajectory.canvases[-1].append(recorded)
        step.clear()
        return stopped

    with (
        mock.patch.object(model, "forward", on_forward),
        mock.patch.object(torch, "multinomial", on_multinomial),
        mock.patch.object(sampler, "initialize_canvas", on_new),
        mock.patch.object(sampler, "accept_canvas", on_accept),
        mock.patch.object(criteria, "__call__", on_stop),
    ):
        yield


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return float64 unchanged, others as float32."""
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()
