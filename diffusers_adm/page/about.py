"""The tab About: what classifier guidance computes."""

import gradio as gr

from diffusers_adm.page.model import PageModel


TEXT = r"""
## What guidance computes

A diffusion model draws an image by removing noise in steps. A classifier that was trained on noised images says how well the noised image
$x_t$ fits a class $y$. The gradient of its log-probability says how to change $x_t$ so that it fits better. Each step follows this gradient,
multiplied by the guidance scale $s$.

**Steps with noise (DDPM).** The UNet predicts the mean $\mu$ and the variance $\Sigma$ of the next step. Guidance shifts the mean:

$$x_{t-1} \sim \mathcal N\big(\mu + s\,\Sigma\,\nabla_{x_t} \log p(y \mid x_t),\ \Sigma\big)$$

**Steps without noise (DDIM and other solvers).** There is no variance, and guidance shifts the predicted noise:

$$\hat\epsilon = \epsilon(x_t) - s\,\sqrt{1 - \bar\alpha_t}\;\nabla_{x_t} \log p(y \mid x_t)$$

With $s = 0$ there is no guidance. A scale above 1 sharpens the distribution of the classifier. Images then fit their class better, and
vary less.

## Links

- [Diffusion Models Beat GANs on Image Synthesis](https://arxiv.org/abs/2105.05233), Dhariwal & Nichol 2021: section 4 derives both formulas.
- [The original code](https://github.com/openai/guided-diffusion).
- [diffusers](https://github.com/huggingface/diffusers), whose schedulers and pipelines this package uses.
"""
MATHS = [{"left": "$$", "right": "$$", "display": True}, {"left": "$", "right": "$", "display": False}]


def build_about(model: PageModel) -> None:
    """Adds the contents of the tab to the page."""
    pixels = f"{model.size}×{model.size} pixels, {model.channels} {'channel' if model.channels == 1 else 'channels'}"
    classes = f"{len(model.classes)} classes" if model.classes else "no classes"
    guided = "with a classifier that guides" if model.is_guided else "without a classifier"
    gr.Markdown(f"{TEXT}\n## The model of this page\n\n{pixels}, {classes}, {guided}.", latex_delimiters=MATHS)
