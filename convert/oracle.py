"""transformers' DiffusionGemma behind the calls of our model, on torch.

The reference of verify.py, export_golden.py and the parity tests. Needs the extra
`parity`.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DynamicCache,
    Gemma4VisionConfig,
)
from transformers.models.diffusion_gemma import generation_diffusion_gemma as sampling
from transformers.utils import logging

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def load_oracle(path: Path, dtype: str = "float32", device: str = "cpu") -> "Oracle":
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
        dtype=DTYPES[dtype],
        # the only expert implementation that supports float64
        experts_implementation="eager",
    )
    return Oracle(model.eval().to(device))


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
        self.device = model.device

    @torch.no_grad()
    def encode(
        self, tokens: np.ndarray, cache: DynamicCache | None = None
    ) -> tuple[np.ndarray, DynamicCache]:
        """Encode (B, T) ids; return the (B, T, D) last hidden state and the cache."""
        if cache is None:
            cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        output = self.model.model.encoder(
            input_ids=torch.tensor(tokens, device=self.device), cache=cache
        )
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
        encoder, ids = self.model.model.encoder, torch.tensor(tokens)
        dtype = encoder.get_input_embeddings().weight.dtype
        cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        masks = encoder.create_masks_for_generate(
            config=self.config,
            inputs_embeds=torch.empty((*ids.shape, 0), dtype=dtype),
            attention_mask=None,
            cache=cache,
            position_ids=torch.arange(ids.shape[1])[None],
            mm_token_type_ids=(ids == self.config.image_token_id).int(),
        )
        soft = encoder.get_image_features(
            torch.tensor(pixels).to(self.device, dtype),
            torch.tensor(positions, device=self.device),
            return_dict=True,
        )
        output = encoder(
            input_ids=ids.to(self.device),
            attention_mask=masks,
            cache=cache,
            mm_encoder_outputs={"image": soft},
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
        conditioning = None
        if processed_logits is not None:
            dtype = self.model.model.decoder.embed_tokens.weight.dtype
            conditioning = torch.tensor(processed_logits).to(self.device, dtype)
        output = self.model(
            cache=cache,
            decoder_input_ids=torch.tensor(canvas, device=self.device),
            self_conditioning_logits=conditioning,
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

    def router(self, layer: int, residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (N, E) probabilities and (N, k) sorted choices of (N, D) residuals."""
        router = self.model.model.decoder.layers[layer].router
        dtype = router.proj.weight.dtype
        with torch.no_grad():
            given = torch.tensor(residual).to(self.device, dtype)
            probabilities, _, indices = router(given)
        return to_numpy(probabilities), np.sort(to_numpy(indices, exact=True), axis=-1)

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


def to_numpy(tensor: torch.Tensor, *, exact: bool = False) -> np.ndarray:
    """Return float64 and `exact` tensors unchanged, others as float32."""
    exact = exact or tensor.dtype == torch.float64
    return (tensor if exact else tensor.float()).cpu().numpy()
