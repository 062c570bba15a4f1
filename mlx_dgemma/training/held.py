"""What one pass through a layer holds in memory until its gradients are made.

Arrays are counted: every buffer that MLX 0.32 held at the peak of small models was
listed on the CPU backend, and a count below is how many there were of a width, with
its reason. Widths are of N tokens: D hidden, I dense inner, Q queries, K keys, E
experts, S scores; of the pairs of token and expert: P hidden; of the experts' rows: RD
hidden, RM inner. MLX makes the gradients of weights as late as it can, so both factors
of the products that they are live long.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx

from .. import backends
from ..checkpoint.config import LayerConfig, ModelConfig
from ..model.attention import MIN_TILE, causal_tiles
from ..model.cache import Span

FLOAT = 4  # bytes of an adapter's float32, and of a CPU's products
# Product -> what goes into it (one array where the names are equal), its width, and
# the width of what comes out.
PRODUCTS = {
    "self_attn.q_proj": ("normed", "D", "Q"),
    "self_attn.k_proj": ("normed", "D", "K"),
    "self_attn.v_proj": ("normed", "D", "K"),
    "self_attn.o_proj": ("attended", "Q", "D"),
    "mlp.gate_proj": ("dense", "D", "I"),
    "mlp.up_proj": ("dense", "D", "I"),
    "mlp.down_proj": ("gated", "I", "D"),
    "experts.gate_up_proj": ("rows", "RD", "2RM"),
    "experts.down_proj": ("expert", "RM", "RD"),
    "router.proj": ("routed", "D", "E"),
}
# Elementwise operations on the way back, of which a CPU allocates some fifty ahead of
# the one it runs: arrays of a width alive together, beside those held anyway.
CHAINS = {"I": 7, "RM": 8, "D": 11, "Q": 5, "S": 3}
# Everything made on the way there, float32 and half arrays of a width: up to the
# choice of experts, and behind it; the latter differs where activations are float32.
CHOOSING = {"D": (12, 9), "Q": (8, 6), "S": (4, 0), "E": (6, 0)}
FEEDING = {"D": (15, 15), "I": (5, 11), "P": (8, 2), "PM": (11, 0)}
FEEDING_FLOAT = {"D": (16, 0), "I": (11, 0), "P": (6, 0), "PM": (11, 0)}
NARROW = 160  # float32 numbers of a token in arrays narrower than any width


@dataclass(frozen=True)
class Traits:
    """What of a device decides how much is held.

    logits   float32 arrays of a tile of the vocabulary alive at once
    """

    device: backends.Backend
    logits: int

    @classmethod
    def here(cls) -> "Traits":
        """Of the device MLX computes on."""
        device = backends.current()
        return cls(device, 16) if device.name == "cpu" else cls.gpu(device)

    @classmethod
    def gpu(cls, device: backends.Backend = backends.BACKENDS["metal"]) -> "Traits":
        """Of Metal and CUDA. Not measured there: arrays are counted as on a CPU, where
        nothing is fused; of logits fewer, as fewer operations are allocated ahead."""
        return cls(device, 6)

    def loops(self, dtype: mx.Dtype, *, quantized: bool) -> bool:
        """Whether experts take one product each."""
        return self.device.experts(dtype, quantized=quantized, pairs=1) == "loop"

    def groups(self, pairs: int) -> bool:
        """Whether that many rows are gathered in blocks of one expert each."""
        path = self.device.experts(mx.float32, quantized=False, pairs=pairs)
        return path == "blocks"


@dataclass(frozen=True, kw_only=True)
class Pass:
    """`texts` of `new` columns each in one layer, with `seen` columns before them.

    causal   the encoder's; the decoder's if not
    keys     the products that are trained here, names in PRODUCTS
    rank     of their adapters; 0 where the weights themselves are trained
    value    bytes of an activation

    All its figures are bytes.
    """

    config: ModelConfig
    layer: LayerConfig
    traits: Traits
    texts: int
    new: int
    seen: int
    causal: bool
    keys: Collection[str]
    rank: int
    value: int

    @property
    def tokens(self) -> int:
        return self.texts * self.new

    @property
    def columns(self) -> int:
        """Keys of all texts."""
        return self.texts * (self.seen + self.new)

    @property
    def parts(self) -> int:
        """What is kept of a token: keys and values, or what both come from."""
        return 2 if self.layer.sliding else 1

    @cached_property
    def size(self) -> dict[str, int]:
        """Elements of an array of each width."""
        config, tokens, rows = self.config, self.tokens, self._rows()
        width, inner = config.hidden_size, config.moe_intermediate_size
        pairs = tokens * config.top_k_experts
        return {
            "D": tokens * width,
            "I": tokens * config.intermediate_size,
            "Q": tokens * config.num_attention_heads * self.layer.head_dim,
            "K": tokens * self.layer.kv_heads * self.layer.head_dim,
            "E": tokens * config.num_experts,
            "P": pairs * width,
            "PM": pairs * inner,
            "RD": rows * width,
            "RM": rows * inner,
            "2RM": 2 * rows * inner,
            "S": self._scores(),
        }

    def input(self) -> int:
        return self.value * self.size["D"]

    def kept(self) -> int:
        """Keys and values that the other pass sees; their cotangents are as large."""
        return self.value * self.parts * self.size["K"]

    def residuals(self) -> int:
        """What the way back through the layer needs of the way there."""
        # D: the inputs of norms; I: gate, up, gelu; Q: queries as projected and as
        # turned, and values attended to before a sum divides them
        counts = {"D": 6, "I": 3, "Q": 3, "E": 2, "S": 1, "P": 1, "RM": 3}
        if self.keys and not self.rank:  # what stands before the weight of a norm
            counts |= {"D": 13, "Q": 4, "K": 1}
        own = self.layer.kv_heads * self.layer.head_dim
        turned = 3 * self.columns  # as projected, and keys and values as attended to
        if self.layer.sliding:
            turned = 2 * self.tokens + 2 * self.columns
        held = turned * own + sum(n * self.size[width] for width, n in counts.items())
        return self.value * held + self._inputs()

    def leaves(self) -> int:
        """What is held until weights get their gradients: both factors of each."""
        size, each = self.size, FLOAT if self.rank else self.value
        outputs = sum(size[PRODUCTS[key][2]] for key in self.keys)
        if self.keys and not self.rank:  # norms
            outputs += 11 * size["D"] + 2 * size["Q"] + self.parts * size["K"]
        return self._inputs() + each * outputs

    def chain(self) -> int:
        """The widest chain of elementwise operations on the way back."""
        size = self.size
        return self.value * max(n * size[width] for width, n in CHAINS.items())

    def choosing(self) -> int:
        """Every array made up to the choice of experts.

        A CPU that reads the choice on the host has computed them while gradients are
        still being traced, and MLX frees nothing traced before all of it is.
        """
        rotated = self.layer.rope.rotated * self.config.num_attention_heads
        narrow = self.tokens * (6 * self.value * rotated + FLOAT * NARROW)
        made = self._made(CHOOSING, self.size) + narrow + self._kept_made()
        return made + self._adapted("self_attn.", "router.")

    def feeding(self) -> int:
        """Every array made behind `choosing`, likewise held."""
        widths = FEEDING if self.value < FLOAT else FEEDING_FLOAT
        return self._made(widths, self.size) + self._adapted("mlp.", "experts.")

    def attention_weights(self) -> int:
        """Of the attention, dense and float32."""
        layer, heads = self.layer, self.config.num_attention_heads
        lines = (2 * heads + self.parts * layer.kv_heads) * layer.head_dim
        return FLOAT * self.config.hidden_size * lines

    def feeding_weights(self) -> int:
        """Of the feed-forward and of the experts expected to be chosen, likewise."""
        config = self.config
        missed = (1 - config.top_k_experts / config.num_experts) ** self.tokens
        chosen = config.num_experts * (1 - missed)
        # an expert's part of a trained weight is a copy, held as well
        each = FLOAT + (self.value if self.keys and not self.rank else 0)
        inner = FLOAT * config.intermediate_size
        inner += each * chosen * config.moe_intermediate_size
        return round(3 * config.hidden_size * inner)

    def _rows(self) -> int:
        """Of the experts: the pairs, or blocks of them as in `model.layers`."""
        experts = self.config.num_experts
        pairs, size = self.tokens * self.config.top_k_experts, 4
        if not self.traits.groups(pairs):
            return pairs
        while size < 64 and 8 * size * experts <= pairs:
            size *= 2
        return (pairs // size + experts) * size

    def _scores(self) -> int:
        """Pairs of query and key of all heads, tile by tile as in `Attention`."""
        heads, columns = self.config.num_attention_heads, self.seen + self.new
        if not self.causal:
            return self.tokens * heads * columns
        largest = self.traits.device.score_bytes // (4 * self.texts * heads * columns)
        most, window = max(MIN_TILE, largest), None
        if self.layer.sliding:
            window = self.config.sliding_window
            most = min(most, max(window // 2, 16))
        tiles = causal_tiles(self.new, Span(0, columns, (0,)), window, most)
        cells = sum((t.end - t.begin) * (t.seen.end - t.seen.begin) for t in tiles)
        return self.texts * heads * cells

    def _inputs(self) -> int:
        """What trained products are of; of an adapter float32, and its own middle."""
        size, each = self.size, FLOAT if self.rank else self.value
        inputs = {name: width for name, width, _ in (PRODUCTS[k] for k in self.keys)}
        middle = FLOAT * self.rank * self.tokens * len(self.keys)
        return each * sum(size[width] for width in inputs.values()) + middle

    def _kept_made(self) -> int:
        """Arrays of keys and values among those of `choosing`."""
        own, behind = (1, 1), (8, 5)  # of its own columns, and of all it sees
        if self.layer.sliding:
            own, behind = (9, 4), (0, 2)
        if self.causal:
            own, behind = ((12, 6) if self.layer.sliding else (9, 5)), (0, 0)
        width = self.layer.kv_heads * self.layer.head_dim
        size = {"own": self.tokens * width, "behind": self.columns * width}
        return self._made({"own": own, "behind": behind}, size)

    def _adapted(self, *kinds: str) -> int:
        """What adapters of such layers make: their input in float32; their output so,
        scaled, in the activations' type, and added."""
        found, half = 0, self.value < FLOAT
        for key in self.keys if self.rank else ():
            _, taken, given = PRODUCTS[key]
            if key.startswith(kinds):
                widths = {given: (2, 2), taken: (1, 0)} if half else {given: (3, 0)}
                found += self._made(widths, self.size)
        return found

    def _made(
        self, widths: Mapping[str, tuple[int, int]], size: Mapping[str, int]
    ) -> int:
        """Bytes of float32 arrays, and of half ones where activations are half."""
        half = self.value if self.value < FLOAT else 0
        return sum(
            (FLOAT * floats + half * halves) * size[width]
            for width, (floats, halves) in widths.items()
        )
