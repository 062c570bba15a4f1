"""Between hidden states and the vocabulary: embedding, head, soft embeddings.

One tied matrix E of (V, D), dense or quantised, serves all three.
"""

import math

import mlx.core as mx
import mlx.nn as nn

Embedding = nn.Embedding | nn.QuantizedEmbedding


def embed(embedding: Embedding, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
    """(B, T) ids -> (B, T, D) in `dtype`, times sqrt(D) rounded to it."""
    x = embedding(tokens).astype(dtype)
    return x * mx.array(math.sqrt(x.shape[-1]), dtype=x.dtype)


def soft_embed(
    embedding: Embedding, processed_logits: mx.array, dtype: mx.Dtype
) -> mx.array:
    """(B, L, V) logits -> (B, L, D) in `dtype`: softmax · E · sqrt(D).

    The logits are rounded to that dtype before the float32 softmax and the
    probabilities after it, as transformers does between two steps.
    """
    logits = processed_logits.astype(dtype).astype(mx.float32)
    probabilities = mx.softmax(logits, axis=-1).astype(dtype)
    if isinstance(embedding, nn.QuantizedEmbedding):
        soft = mx.quantized_matmul(
            probabilities,
            embedding.weight,
            embedding.scales,
            embedding.get("biases"),
            transpose=False,
            group_size=embedding.group_size,
            bits=embedding.bits,
            mode=embedding.mode,
        )
    else:
        soft = probabilities @ embedding.weight
    return soft.astype(dtype) * mx.array(math.sqrt(soft.shape[-1]), dtype=dtype)


def head(embedding: Embedding, hidden: mx.array, softcap: float) -> mx.array:
    """(B, L, D) -> (B, L, V) float32: softcap · tanh(hidden · Eᵀ / softcap)."""
    logits = embedding.as_linear(hidden).astype(mx.float32)
    return mx.tanh(logits / softcap) * softcap
