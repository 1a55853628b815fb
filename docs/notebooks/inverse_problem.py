# %% [markdown]
# # An inverse problem
#
# The upper half of a digit is lost, and the lower half is noisy. Which digits can it have been? A diffusion model that was trained for
# none of this answers: the measurement guides it, as a classifier would.

# %%
import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler

from diffusers_adm import ClassifierGuidedPipeline, default_model


pipe = ClassifierGuidedPipeline.from_pretrained(default_model())
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)

# %% [markdown]
# ## The measurement
#
# A measurement is $y = A x_0 + \sigma n$. Here $A$ keeps the lower half of the rows, and $n$ is normal noise. The digit itself is a 9
# that the model has drawn.

# %%
noise_level = 0.2


def measure(x):
    """Applies A: the lower half of the rows."""
    return x[:, :, 16:]


truth = pipe(
    [9],
    num_inference_steps=25,
    generator=torch.Generator().manual_seed(7),
    output_type="latent",
).images
clean = measure(truth)
measured = clean + noise_level * torch.randn(
    clean.shape, generator=torch.Generator().manual_seed(1)
)


def show(ax, image, title=None, **style):
    picture = ax.imshow(image, **{"cmap": "gray", "vmin": -1, "vmax": 1, **style})
    ax.set(xticks=[], yticks=[], title=title)
    return picture


figure, axes = plt.subplots(1, 2, figsize=(3, 1.7), layout="constrained")
show(axes[0], truth[0, 0], "digit")
show(axes[1], torch.cat([torch.zeros(16, 32), measured[0, 0]]), "measured")
plt.show()

# %% [markdown]
# ## A measurement guides like a classifier
#
# Classifier guidance adds $\nabla_{x_t} \log p(y \mid x_t)$ to the score of the model. For a measurement, this is approximately the
# log-likelihood of the predicted clean image, $\log \mathcal N(y;\, A \hat x_0(x_t),\, \sigma^2)$ (diffusion posterior sampling, Chung et
# al. 2022, [arXiv 2209.14687](https://arxiv.org/abs/2209.14687)). The pipeline takes such a function as `guidance_fn`. `through_unet`
# says that its gradient goes through the UNet to $x_t$.


# %%
def log_likelihood(x_t, timestep, x_0, class_labels):
    """Returns log p(y | x_0) per image, `(batch,)`, up to a constant."""
    return -(measured - measure(x_0)).square().sum(dim=(1, 2, 3)) / (2 * noise_level**2)


log_likelihood.through_unet = True


def solve(batch_size, seed=0, **call):
    """Draws images that agree with the measurement, `(batch, 1, 32, 32)` in [-1, 1]."""
    return pipe(
        batch_size=batch_size,
        num_inference_steps=50,
        guidance_fn=log_likelihood,
        guidance_scale=1.0,
        guidance_options={
            "max_x_0_shift": 0.5
        },  # early predictions are far from any measurement
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **call,
    ).images.clamp(-1, 1)


# %% [markdown]
# ## Several solutions
#
# The measurement does not determine the digit, so each noise leads to another one. Their mean and standard deviation show where the
# solutions agree.

# %%
solutions = solve(12, condition_unet=False)

figure, axes = plt.subplots(2, 7, figsize=(7, 2.4), layout="constrained")
for ax, image in zip(axes[:, :6].flat, solutions):
    show(ax, image[0])
show(axes[0, 6], solutions.mean(dim=0)[0], "mean")
show(axes[1, 6], solutions.std(dim=0)[0], "deviation", cmap="viridis", vmin=0, vmax=1)
plt.show()

error = (measure(solutions) - measured).square().mean().sqrt()
print(
    f"Error of the solutions at the measured pixels: {error:.2f}. Noise of the measurement: {noise_level:.2f}."
)

# %% [markdown]
# The classifier knows digits. Its belief, averaged over the solutions, answers the question of the beginning:

# %%
with torch.no_grad():
    belief = pipe.classifier(solutions, 0).logits.softmax(dim=1).mean(dim=0)  # (classes,)

figure, ax = plt.subplots(figsize=(7, 1.8), layout="constrained")
ax.bar(range(10), belief)
ax.set(xticks=range(10), xlabel="class", ylabel="probability", ylim=(0, 1))
plt.show()

# %% [markdown]
# ## A solution of a wanted class
#
# The UNet can be told the class while the measurement guides:

# %%
wanted = [4, 9]
figure, axes = plt.subplots(1, len(wanted), figsize=(2.4, 1.5), layout="constrained")
for ax, digit, image in zip(axes, wanted, solve(len(wanted), class_labels=wanted)):
    show(ax, image[0], f"as a {digit}")
plt.show()

# %% [markdown]
# {doc}`/guides/inverse_problems` has other methods: hooks that replace the predicted $x_0$ (DDNM), jumps back in time (RePaint), and
# inversion. {doc}`/guides/toolboxes` connects the models to the samplers of deepinv.
