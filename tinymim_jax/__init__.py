"""TinyMIM in JAX: small vision transformers, distilled from large ones by their token relations."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinymim_jax.evaluation.predictor import Model


def load(path: str, **options: Any) -> "Model":
    """The trained model in `path`, to classify or embed images with; see `evaluation.predictor.load`."""
    from tinymim_jax.evaluation import predictor  # imports jax, which takes a second; `tinymim --help` does without

    return predictor.load(path, **options)


def distill(**arguments: Any) -> dict[str, Any]:
    """A small network from a teacher and a folder of images; see `starter.api.distill`."""
    from tinymim_jax.starter import api

    return api.distill(**arguments)
