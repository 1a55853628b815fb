"""Gradient of a guidance function (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4)."""

import contextlib
import math
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from diffusers_adm.diffusion import root_mean_square


GuidanceFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

# Half-precision gradients of log p(y | x_t), about 1e-4 per pixel, lose bits to underflow. Scaling the loss by a power of two
# avoids this without rounding.
FLOAT16_LOSS_SCALE = 2.0**10


def shortened(gradient: torch.Tensor, max_size: float) -> torch.Tensor:
    """Shortens each image's gradient to a root mean square of at most `max_size`."""
    size = root_mean_square(gradient)
    factor = max_size / size.where(size > max_size, 1.0)
    return gradient * factor.where(size > max_size, 1.0)


@contextlib.contextmanager
def differentiable(weights_may_move: bool = True):
    """
    Turns on gradients with respect to inputs, also within `torch.no_grad` and `torch.inference_mode`.

    Args:
        weights_may_move: Whether a weight may be replaced between the forward and the backward pass, as offloading and
            layerwise casting do.
    """
    with torch.inference_mode(False), torch.enable_grad(), keeping_weights(weights_may_move):
        yield


def keeping_weights(weights_may_move: bool) -> contextlib.AbstractContextManager:
    """
    Lets the backward pass use the weights of the forward pass, although they may be replaced in between. Without it, the backward
    pass would read the replaced data.
    """
    if not weights_may_move:
        return contextlib.nullcontext()
    # A detached tensor keeps the data of the forward pass.
    return torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach(), lambda saved: saved)


@contextlib.contextmanager
def without_gradients():
    """Turns off gradients. Tensors are still made outside of inference mode, so that later gradients may use them."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def gradients(on: bool) -> contextlib.AbstractContextManager:
    """Turns gradients on or off."""
    return differentiable(weights_may_move=False) if on else without_gradients()


def recomputed(function: Callable, *arguments, **keywords):
    """
    Calls a function with gradients. The activations of its networks are not kept, but computed again in the backward pass, so that
    memory does not grow with the number of calls.
    """
    return checkpoint(function, *arguments, use_reentrant=False, **keywords)


def moves_weights(network: Callable) -> bool:
    """Returns whether a network may replace its weights in a forward pass, as the hooks of offloading and layerwise casting do."""
    if not isinstance(network, torch.nn.Module):
        return True  # a plain function may use any network
    # The dict is read, because `hasattr` of a module is much slower if there is no such attribute.
    return any(name in vars(module) for module in network.modules() for name in ("_hf_hook", "_diffusers_hook"))


def weights_in_place(network: Callable) -> list[torch.nn.Parameter]:
    """Returns the weights of a network, or none if a forward pass may replace them or the network is a plain function."""
    return [] if moves_weights(network) else list(network.parameters())


@contextlib.contextmanager
def frozen(weights: list[torch.nn.Parameter]):
    """
    Records no gradients with respect to weights inside the context. With `torch.compile`, the backward pass does not compute them
    either. Afterwards, the weights require gradients as before.
    """
    trained = [weight for weight in weights if weight.requires_grad]
    try:
        for weight in trained:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy that requires a gradient. It is a copy, because autograd cannot save tensors that inference mode made."""
    return tensor.detach().clone().requires_grad_()


def autocasts_to_half(device_type: str) -> bool:
    """Returns whether autocast to float16 is on for a type of device."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return False
    return torch.get_autocast_dtype(device_type) == torch.float16


def guidance_gradient(
    guidance_fn: GuidanceFunction,
    x_t: torch.Tensor,
    timestep: torch.Tensor,
    x_0: torch.Tensor,
    class_labels: torch.Tensor | None,
    through_half: bool = False,
    create_graph: bool = False,
) -> torch.Tensor:
    """
    Returns the gradient of a guidance function, of the shape and dtype of `x_t`. Weights and their `requires_grad` do not change.

    Args:
        guidance_fn: Guidance function, see the docstring of `diffusers_adm.guidance`.
        x_t: Noised images, `(batch, channels, height, width)`. If `x_0` depends on them, they are a leaf that requires a gradient.
        timestep: Training timestep of each image, `(batch,)`.
        x_0: Predicted clean images, `(batch, channels, height, width)`.
        class_labels: Class of each image, `(batch,)`, or `None`.
        through_half: Whether `x_0` depends on `x_t` through a network in float16. The gradient is then scaled so that the backward
            pass neither overflows nor underflows in float16. This takes a second backward pass of the function.
        create_graph: Whether the gradient itself is differentiable with respect to `x_t` and `x_0`. The function must then not guide
            through the UNet.

    Raises:
        ValueError: If the function returns neither a log-probability per image nor a gradient.
    """
    half = getattr(guidance_fn, "dtype", None) == torch.float16 or autocasts_to_half(x_t.device.type)
    with contextlib.ExitStack() as stack:
        stack.enter_context(differentiable(getattr(guidance_fn, "weights_may_move", True) and not create_graph))
        stack.enter_context(frozen(getattr(guidance_fn, "frozen_weights", [])))
        depends = x_0.grad_fn is not None and not create_graph
        if create_graph:
            # The fast kernels of attention have no second derivative.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            # The derivative is taken of each as if it were alone.
            x_t, x_0 = ((one if one.requires_grad else leaf(one)).view_as(one) for one in (x_t, x_0))
        elif not depends:
            x_t, x_0 = leaf(x_t), leaf(x_0)
        # Clones are made outside inference mode, because autograd cannot save tensors that inference mode made.
        value = guidance_fn(x_t, timestep.clone(), x_0, None if class_labels is None else class_labels.clone())
        check_value(value, x_t)
        if value.shape == x_t.shape:
            return (value if create_graph else value.detach()).to(x_t.dtype)
        inputs = [x_t] if depends else [x_t, x_0]
        inputs = [x_0] if getattr(guidance_fn, "of_x_0_alone", False) else inputs
        gradients = [None]
        value = value.float()  # (batch,)
        loss_scale = torch.full_like(value, FLOAT16_LOSS_SCALE if half else 1.0)  # powers of two do not round
        if through_half and value.requires_grad:
            (at_x_0,) = torch.autograd.grad((loss_scale * value).sum(), x_0, retain_graph=True, allow_unused=True)
            if at_x_0 is not None:
                _, exponent = (at_x_0.abs().amax(dim=(1, 2, 3)) / loss_scale).frexp()
                largest = FLOAT16_LOSS_SCALE if half else math.inf  # a float16 function would overflow above it
                loss_scale = torch.ldexp(torch.ones_like(value), -exponent).clamp(max=largest)
        if value.requires_grad:
            # The sum, not the mean, because an image's gradient must not depend on the batch size.
            total = (loss_scale * value).sum()
            gradients = torch.autograd.grad(total, inputs, allow_unused=True, create_graph=create_graph)
        gradients = [one for one in gradients if one is not None]
        if not gradients:
            raise ValueError(
                "`guidance_fn` must compute the log-probability from x_t or x_0, but the returned one depends on neither."
            )
        gradient = sum(gradients)
    return (gradient / loss_scale[:, None, None, None]).to(x_t.dtype)


def check_value(value: torch.Tensor, x_t: torch.Tensor) -> None:
    """Raises a ValueError if what a guidance function has returned is neither a log-probability per image nor a gradient."""
    is_tensor = isinstance(value, torch.Tensor)
    if is_tensor and not value.is_complex() and value.shape in (x_t.shape, x_t.shape[:1]):
        return
    got = f"{tuple(value.shape)}, {value.dtype}" if is_tensor else type(value).__name__
    raise ValueError(
        f"`guidance_fn` must return one log-probability per image, {tuple(x_t.shape[:1])}, or a gradient,"
        f" {tuple(x_t.shape)}, but it returned {got}."
    )
