# %% [markdown]
# # The paper in ten minutes
#
# [Dhariwal & Nichol 2021](https://arxiv.org/abs/2105.05233) guide a diffusion model by the gradient of a classifier. This notebook
# looks inside one guided run, writes the paper's Algorithm 1 by hand, and repeats its Table 4 in small. The model is the one that
# ships with the package. It draws digits of 32x32 pixels, and a CPU is enough.

# %%
import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler

from diffusers_adm import ClassifierGuidedPipeline, default_cascade, default_model
from diffusers_adm.diffusion import (
    NoiseSchedule,
    learned_log_variance,
    posterior_mean,
    x_0_from_epsilon,
)


pipe = ClassifierGuidedPipeline.from_pretrained(default_model())
pipe.set_progress_bar_config(disable=True)

# %% [markdown]
# ## One run, step by step
#
# `pipe.steps` takes the arguments of a call and yields its steps. `condition_unet=False` hides the class from the UNet. The classifier
# alone knows that a 3 is wanted.

# %%
digit, scale = 3, 10.0
call = {
    "class_labels": [digit],
    "guidance_scale": scale,
    "condition_unet": False,
    "timestep_respacing": "50",
}
steps = list(
    pipe.steps(**call, generator=torch.Generator().manual_seed(0), output_type="latent")
)

# %% [markdown]
# Each step begins with a noised image $x_t$. The UNet predicts the clean image $x_0$. The classifier gives the gradient
# $\nabla \log p(y \mid x_t)$: red pixels should become brighter, blue ones darker. Below, its belief $p(y \mid x_t)$ in each of the
# ten classes.

# %%
shown = steps[::7]
figure = plt.figure(figsize=(8, 6.2), layout="constrained")
above, below = figure.subfigures(2, height_ratios=(1.25, 1))

rows = {"noised $x_t$": "x_t", "predicted $x_0$": "x_0", "gradient": "gradient"}
for axes, (name, attribute) in zip(above.subplots(3, len(shown)), rows.items()):
    for ax, step in zip(axes, shown):
        image = getattr(step, attribute)[0, 0]
        limit = image.abs().max() if attribute == "gradient" else 1
        ax.imshow(
            image,
            cmap="RdBu_r" if attribute == "gradient" else "gray",
            vmin=-limit,
            vmax=limit,
        )
        ax.set(xticks=[], yticks=[])
        if attribute == "x_t":
            ax.set_title(f"t = {step.timestep}", fontsize=10)
    axes[0].set_ylabel(name)

belief = torch.stack(
    [step.log_probabilities[0].exp() for step in steps]
)  # (steps, classes)
ax = below.subplots()
picture = ax.imshow(belief.T, aspect="auto", cmap="viridis", vmin=0, vmax=1)
ax.set(xlabel="step", ylabel="class", yticks=range(10))
below.colorbar(picture, label=r"$p(y \mid x_t)$")
plt.show()

# %% [markdown]
# ## Algorithm 1 by hand
#
# Each step draws $x_{t-1}$ from a Gaussian. Guidance shifts its mean $\mu$ by $s \Sigma \nabla \log p(y \mid x_t)$, see
# {doc}`/concepts/classifier_guidance`. In code:

# %%
schedule = NoiseSchedule.from_config(pipe.scheduler.config, "50")
generator = torch.Generator().manual_seed(0)
x = torch.randn(1, 1, 32, 32, generator=generator)

for i in reversed(range(len(schedule))):
    t, x = schedule.timesteps[i], x.detach().requires_grad_()
    log_p = pipe.classifier(x, t).logits.log_softmax(dim=1)[:, digit]
    (gradient,) = torch.autograd.grad(log_p.sum(), x)
    with torch.no_grad():
        epsilon, v = pipe.unet(x, t).sample.chunk(2, dim=1)
        x_0 = x_0_from_epsilon(schedule, x, i, epsilon).clamp(-1, 1)
        mean, log_variance = (
            posterior_mean(schedule, x, i, x_0),
            learned_log_variance(schedule, i, v),
        )
        mean = mean + log_variance.exp() * (scale * gradient)
        x = (
            mean + (0.5 * log_variance).exp() * torch.randn(x.shape, generator=generator)
            if i
            else mean
        )

# %% [markdown]
# The result is the pipeline's image, to the last bit:

# %%
assert torch.equal(x, steps[-1].latents)

# %% [markdown]
# ## The trade-off of the scale
#
# A larger scale makes images fit their class better, and makes them more alike. Each column below starts from other noise. All
# images of a column start from the same noise. From here on, 25 steps of DDIM are enough.

# %%
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)


def draw(labels, scale, condition_unet):
    """Draws one image per label, `(images, 1, 32, 32)` in [-1, 1], with one seed per image."""
    return pipe(
        class_labels=labels,
        guidance_scale=scale,
        condition_unet=condition_unet,
        num_inference_steps=25,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(labels))],
        output_type="latent",
    ).images


labels = [digit for digit in range(10) for _ in range(3)]
rows = [
    (condition_unet, scale)
    for condition_unet in (False, True)
    for scale in (0.0, 1.0, 10.0)
]
drawn = [draw(labels, scale, condition_unet) for condition_unet, scale in rows]
names = [
    f"{'conditional' if condition_unet else 'unconditional'}, scale {scale:g}"
    for condition_unet, scale in rows
]

# %%
figure, axes = plt.subplots(len(rows), 1, figsize=(8, 2.2), layout="constrained")
for ax, name, images in zip(axes, names, drawn):
    ax.imshow(torch.cat(list(images[:, 0]), dim=1), cmap="gray", vmin=-1, vmax=1)
    ax.set(yticks=[], xticks=[])
    ax.set_ylabel(name, rotation=0, ha="right", va="center")
axes[-1].set_xticks([48 + 96 * digit for digit in range(10)], range(10))
axes[-1].set_xlabel("digit that was asked for")
plt.show()

# %% [markdown]
# ## Table 4 in small
#
# The paper measures FID, precision and recall of 50,000 images. Two simple measures show the same trade-off. *Right* is the share of
# images that a judge takes for the digit that was asked for. The judge is the classifier of another model, for digits of 16x16 pixels,
# and has guided nothing here. *Variety* is the mean distance between two images of the same digit.

# %%
judge = ClassifierGuidedPipeline.from_pretrained(default_cascade()[0]).classifier


@torch.no_grad()
def measure(images):
    small = torch.nn.functional.avg_pool2d(images, 2)
    right = judge(small, 0).logits.argmax(dim=1) == torch.tensor(labels)
    per_digit = images.reshape(10, 3, 32 * 32)  # (digits, images, pixels)
    return right.float().mean().item(), torch.cdist(per_digit, per_digit).sum().item() / (
        10 * 3 * 2
    )


print(f"{'UNet and guidance':<24}{'right':>8}{'variety':>9}")
for name, images in zip(names, drawn):
    right, variety = measure(images)
    print(f"{name:<24}{right:>8.0%}{variety:>9.1f}")

# %% [markdown]
# As in the paper, a large scale gives an unconditional model its classes, at the price of variety. A conditional model needs little
# guidance. {doc}`/guides/guidance_scale` has FD, precision and recall of 2000 images per row, and {doc}`/guides/evaluation` says
# how to measure your own model.
