"""Classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4): its gradient, and what the gradient shifts.

All tensors are `(batch, channels, height, width)` where nothing else is said.
"""

import torch


# Half-precision gradients of log p(y | x_t), about 1e-4 a pixel, lose bits to underflow; a power of two moves them back
# without rounding.
FLOAT16_LOSS_SCALE = 2.0**10


def classifier_gradient(
    classifier: torch.nn.Module, x_t: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
) -> torch.Tensor:
    """
    The gradient of log p(y | x_t) with respect to x_t, taken at x_t as the published code does.

    Only x_t gets a gradient: the classifier's weights and their `requires_grad` stay as they are. Works under
    `torch.no_grad` and `torch.inference_mode`, and with offloaded or layerwise-cast weights.

    Args:
        classifier: Called as `classifier(x_t, timestep).logits`, `(batch, num_classes)`.
        x_t: Noised images.
        timestep: Training timestep of each image, `(batch,)`.
        class_labels: The class that guides each image, `(batch,)`.

    Returns:
        Of x_t's shape and dtype.
    """
    dtype = getattr(classifier, "dtype", x_t.dtype)
    loss_scale = FLOAT16_LOSS_SCALE if dtype == torch.float16 else 1.0
    # Offloading and layerwise casting put other data into a parameter after its module's forward, which the backward
    # pass would then read; a detached tensor keeps what it saw.
    keep_weights = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach(), lambda saved: saved)
    with torch.inference_mode(False), torch.enable_grad(), keep_weights:
        x_t = x_t.detach().clone().requires_grad_()
        # Autograd does not save what was made in inference mode; clones are made outside it.
        timestep, class_labels = timestep.clone(), class_labels.clone()
        logits = classifier(x_t.to(dtype), timestep).logits.float()  # (batch, num_classes)
        log_probability = logits.log_softmax(dim=-1).gather(1, class_labels[:, None])  # (batch, 1)
        # The sum, not the mean: an image's gradient must not depend on the batch it is in.
        (gradient,) = torch.autograd.grad(loss_scale * log_probability.sum(), x_t)
    return gradient / loss_scale


def shift_mean(mean: torch.Tensor, log_variance: torch.Tensor | float, gradient: torch.Tensor) -> torch.Tensor:
    """
    The guided mean of p(x_{t-1} | x_t, y): mu + Sigma * gradient [Algorithm 1].

    Args:
        mean: Of the unguided step, or a draw from it: guidance moves both alike.
        log_variance: Of the step.
        gradient: Of log p(y | x_t), times the guidance scale.
    """
    variance = torch.as_tensor(log_variance).exp()
    return mean + variance * gradient


def shift_epsilon(epsilon: torch.Tensor, noise_scale: torch.Tensor | float, gradient: torch.Tensor) -> torch.Tensor:
    """
    The guided noise: epsilon - sqrt(1 - alpha_bar) * gradient [Algorithm 2, whose text leaves out the scale].

    Args:
        epsilon: Predicted noise.
        noise_scale: sqrt(1 - alpha_bar).
        gradient: Of log p(y | x_t), times the guidance scale.
    """
    return epsilon - noise_scale * gradient
