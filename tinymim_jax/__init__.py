"""TinyMIM in JAX: small vision transformers, distilled from large ones by their token relations."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinymim_jax.inference import Model


def load(path: str, **options: Any) -> "Model":
    """The trained model in `path`, to classify or embed images with; see `inference.load`."""
    from tinymim_jax import inference  # jax is a second's import, which `tinymim --help` can do without

    return inference.load(path, **options)
