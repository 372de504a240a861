"""FLOPs of products and convolutions, counted in the traced program, so for any task, tap, mask and micro-batches."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters import partial_eval

from tinymim_jax.ops.platform import COUNTING, compiling_for
from tinymim_jax.tasks.task import Batch, Losses, Params, Task, losses_of_phases


def matmul_flops(function: Callable, *arguments: Any) -> int:
    """FLOPs of one call with arguments of these shapes; nothing is computed. For FLOPs per image, give a batch of one.

    A multiply-add counts as two. Products in a loop count once per iteration; products whose result is not used do not
    count, as the compiler removes them. Norms, softmax, GELU and the optimizer are left out: they are a few per cent of
    a ViT, and the peak FLOP/s of a chip refers to matrix products.

    Of a convolution every product counts, those with padded zeros too. Raises NotImplementedError for loops of unknown
    length (`while`).
    """
    with compiling_for(COUNTING):  # in dense form, on any machine: kernels compute some products twice
        return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def step_flops(task: Task, frozen: Params, batch: Batch) -> int:
    """FLOPs of one training step on `batch`: the loss and its gradient with respect to all parameters.

    Where the task has phases, the mean over the steps of the training. All arguments may be shapes. What
    `model.remat` recomputes counts twice; for the FLOPs that the method needs, build the task without it.
    """
    flops = phase_flops(task, frozen, batch)
    if not task.phases:
        return flops[0]
    steps = [len(phase.span or ()) for phase in task.phases]
    return round(sum(count * each for count, each in zip(steps, flops, strict=True)) / sum(steps))


def phase_flops(task: Task, frozen: Params, batch: Batch) -> list[int]:
    """FLOPs of a step of each phase, as `step_flops`; one number where the task has no phases."""
    params = jax.eval_shape(task.init, jax.random.key(0))

    def count(losses: Losses) -> int:
        def gradient(params: Params, frozen: Params, batch: Batch) -> Params:
            return jax.grad(lambda p: losses(p, frozen, batch, jax.random.key(0), True)["loss"].mean())(params)

        return matmul_flops(gradient, params, frozen, batch)

    return [count(losses) for losses in losses_of_phases(task)]


def _count(jaxpr: Any) -> int:
    jaxpr, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            raise NotImplementedError("FLOPs of loops of unknown length (while) are not counted")
        if equation.primitive.name == "pallas_call":
            total += equation.params["cost_estimate"].flops
            continue
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inner = [_count(each) for each in _inside(equation)]
        if equation.primitive.name == "cond":
            total += max(inner)
        elif inner:
            total += times * sum(inner)
        elif equation.primitive.name == "dot_general":
            total += _dot_flops(equation)
        elif equation.primitive.name == "conv_general_dilated":
            total += _convolution_flops(equation)
    return total


def _inside(equation: Any) -> list[Any]:
    """The jaxprs inside an equation, such as the body of a scan; for a custom gradient only the one that runs."""
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


def _convolution_flops(equation: Any) -> int:
    """Of the input's places only those count that are not zeros put in between (the gradient of a stride)."""
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    products = math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // outputs
    return 2 * products // math.prod(equation.params["lhs_dilation"])
