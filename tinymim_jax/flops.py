"""FLOPs of matrix products, counted in what jax traces: right for any task, tap, mask and number of parts."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters import partial_eval

from tinymim_jax.tasks.task import Batch, Params, Task


def matmul_flops(function: Callable, *arguments: Any) -> int:
    """Of one call with arguments of these shapes; nothing is computed. For FLOPs an image, give a batch of one.

    A multiplication and an addition count as two. Products whose result is not used are not counted (the compiler
    leaves them out as well), those in a loop as often as it runs. Norms, softmax, GELU and the optimizer are not
    counted: of a ViT they are a few per cent, and no figure of a chip's peak means them.

    Raises NotImplementedError for loops whose length the data decide, and for convolutions.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def step_flops(task: Task, frozen: Params, batch: Batch) -> int:
    """Of one training step on `batch`: every loss and its gradient, by all parameters that it depends on.

    All arguments may be shapes. What `model.remat` computes a second time is counted twice: to know what the method
    needs, build the task without it.
    """
    params = jax.eval_shape(task.init, jax.random.key(0))

    def gradient(params: Params, frozen: Params, batch: Batch) -> Params:
        return jax.grad(lambda p: task.losses(p, frozen, batch, jax.random.key(0), True)["loss"].mean())(params)

    return matmul_flops(gradient, params, frozen, batch)


def _count(jaxpr: Any) -> int:
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("while", "conv_general_dilated"):
            raise NotImplementedError(f"FLOPs of {equation.primitive.name!r} are not counted")
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = [_count(each) for each in _inside(equation)]
        if equation.primitive.name == "cond":
            total += max(inner)
        elif inner:
            total += times * sum(inner)
        elif equation.primitive.name == "dot_general":
            total += _dot_flops(equation)
    return total


def _inside(equation: Any) -> list[Any]:
    """The programs within an equation, such as the body of a scan; of a custom gradient's, the one that is run."""
    found = []
    for name, value in equation.params.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):
            continue
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                found.append(each)
    return found


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
