"""The fused kernel of cuDNN, reached through jax.nn: the fast path on an NVIDIA GPU.

It computes plain attention in half precision: full, causal or in a causal window. It is not used
where it breaks a promise of `dot_product_attention`; `refusal` gives the reason.
"""

import jax

from attention_jax.functional.masks import Band
from attention_jax.functional.options import Options
from attention_jax.types import Array


def refusal(query: Array, key: Array, value: Array, options: Options) -> str | None:
    """Why the kernel cannot compute this, in a few words; None if it can."""
    mask, scale = options.mask, options.scale
    dtypes = sorted({str(x.dtype) for x in (query, key, value)})
    T, S, H, V = query.shape[-3], key.shape[-3], query.shape[-1], value.shape[-1]
    largest = 256 if _capability() >= 9 else 128
    reasons = {
        "it needs an NVIDIA GPU": _capability() == 0,
        f"it takes float16 or bfloat16, not {' and '.join(dtypes)}": dtypes
        not in (["bfloat16"], ["float16"]),
        f"it takes one head size, a multiple of 8 up to {largest}, not H={H} and V={V}": H != V
        or H % 8 > 0
        or H > largest,
        "it has no empty arrays": query.size == 0 or key.size == 0,
        # In cuDNN float32 biases can give NaN gradients, and an empty row is not zero.
        "it has no bias": options.bias is not None,
        # Other masks would need the whole [T, S] array, and their empty rows are not zero.
        "of masks it has causal() and window(left) for T = S": mask is not None
        and not (_is_causal_band(mask) and T == S),
        "it has no softcap": options.softcap is not None,
        "it has no sinks": options.sinks is not None,
        "its dropout is not a function of positions": options.rate is not None,
        "its logsumexp is rounded to half precision": options.residual,
        "its scale is a constant": not (scale is None or isinstance(scale, int | float)),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def cudnn_attention(query: Array, key: Array, value: Array, options: Options) -> Array:
    """`dot_product_attention` for arguments without a `refusal`."""
    mask = options.mask
    # One batch axis. `is_causal` is set with every window: without it the kernel would show the
    # future in a left window.
    flat = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    left = None if mask is None else mask.left
    out = jax.nn.dot_product_attention(
        *flat,
        scale=options.scale,
        is_causal=mask is not None,
        local_window_size=None if left is None else (left, 0),
        implementation="cudnn",
    )
    return out.reshape(query.shape)


def _is_causal_band(mask) -> bool:
    if not isinstance(mask, Band) or not isinstance(mask.offset, int | str):
        return False
    return mask.right == 0 and mask.offset in (0, "end")


def _capability() -> int:
    """The major compute capability of the default NVIDIA GPU; 0 without one."""
    if jax.default_backend() != "gpu":
        return 0
    device = jax.local_devices()[0]
    if "cuda" not in device.client.platform_version.lower():
        return 0
    return int(float(device.compute_capability))
