"""What Metal and CUDA have in common until one of them is measured to differ."""

from .interface import Choices

CHOICES = Choices(
    compiles=True,
    runs_ahead=True,
    product_dtype=None,
    dequantizes=False,
    product_rows=1,
    fused_attention=False,
    score_bytes=512 << 20,
    vocabulary_chunk=32768,
    vocabulary_rows=1024,
)
WHY = {
    "compiles": "fuses small kernels and spares the host",
    "runs_ahead": "the GPU works while the host reads the last step's flags",
    "product_dtype": "it multiplies 16 bits as they are",
    "dequantizes": "its quantised products are fast",
    "score_bytes": "bounds memory behind long prefixes",
    "vocabulary_chunk": "few and large products, bounded memory",
    "vocabulary_rows": "few and large products, bounded memory",
}
