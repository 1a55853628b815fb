# %% [markdown]
# # Train and guide on your own images
#
# From a folder of images to guided pictures: this notebook trains a UNet and a classifier on 600 small images of shapes, and draws with both.
# All of it takes a few minutes on a CPU, because the images have 16x16 pixels and both networks are tiny. Your own images take
# the same steps with a preset such as `--preset small-64`, on a GPU. {doc}`/guides/training` describes all of them.

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw

from diffusers_adm import ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.training import train_classifier, train_unet


# %% [markdown]
# ## A folder of images
#
# One subfolder per class, and any names of files. To try your own images, put them there and skip this cell.

# %%
CORNERS = {"circle": 60, "square": 4, "triangle": 3}
random = np.random.default_rng(0)

for shape, corners in CORNERS.items():
    folder = Path("my_images", shape)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(200):
        x, y = random.uniform(26, 38, size=2)
        circle = (x, y, random.uniform(16, 24))
        image = Image.new("L", (64, 64))
        ImageDraw.Draw(image).regular_polygon(circle, corners, fill="white")
        image.resize((16, 16), Image.Resampling.BOX).save(folder / f"{number}.png")

# %% [markdown]
# ## Train
#
# The scripts are commands: `python -m diffusers_adm.training.train_unet --train_data_dir my_images ...`. In a notebook, their functions
# take the same options. Both networks must be trained with the same noise schedule.
#
# - `--label_dropout` teaches the UNet to draw without a class too.
# - `--prediction_type sample` makes the UNet predict the clean image. In a training as short as this one, its images have less grain
#   than those of a UNet that predicts the noise. Longer ones do not need it.
# - `--norm_num_groups 8` keeps several channels in each group of the normalisation. With a single one, the UNet would hardly learn how
#   bright images are.
# - `--resume_from_checkpoint latest` lets you run the cell again: a run that was interrupted goes on, and one that is complete ends.

# %%
data = "--train_data_dir my_images --in_channels 1 --resolution 16 --noise_schedule cosine "
network = (
    "--model_channels 32 --channel_mult 1,2 --layers_per_block 1 "
    "--attention_resolutions 8 --attention_head_dim 32 --norm_num_groups 8 "
)
run = "--train_batch_size 16 --lr_scheduler cosine --resume_from_checkpoint latest "

options = (
    "--max_train_steps 400 --validation_steps 400 --num_validation_images 6 "
    "--learning_rate 2e-3 --ema_decay 0.98 --prediction_type sample --no-learn_sigma "
    "--label_dropout 0.2 --output_dir runs/unet"
)
train_unet.main(train_unet.parse_args((data + network + run + options).split()))

# %%
options = (
    "--max_train_steps 200 --validation_steps 50 --learning_rate 1e-3 "
    "--validation_fraction 0.1 --output_dir runs/classifier"
)
train_classifier.main(train_classifier.parse_args((data + network + run + options).split()))

# %% [markdown]
# `metrics.jsonl` has one line per log entry. Falling losses are a good sign. So is a held-out accuracy that rises with them: it is an
# average over all noise levels, and at the highest ones no classifier can do better than chance.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")


def plot(ax, run, name, label):
    entries = [
        json.loads(line)
        for line in Path("runs", run, "metrics.jsonl").read_text().splitlines()
    ]
    points = [(entry["step"], entry[name]) for entry in entries if name in entry]
    ax.plot(*zip(*points), label=label)


plot(left, "unet", "simple", "UNet")
plot(right, "classifier", "accuracy", "training images")
plot(right, "classifier", "validation_accuracy", "held-out images")
left.set(xlabel="step", ylabel="squared error of $x_0$", ylim=0)
right.set(xlabel="step", ylabel="accuracy of the classifier", ylim=(0, 1))
right.legend()
plt.show()

# %% [markdown]
# ## Guide
#
# UNet and classifier make the pipeline. It knows the classes by the names of their folders.

# %%
classifier = NoisyClassifier.from_pretrained("runs/classifier/classifier")
pipe = ClassifierGuidedPipeline.from_pretrained("runs/unet/pipeline", classifier=classifier)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)

labels = [shape for shape in CORNERS for _ in range(4)]
call = {"class_labels": labels, "num_inference_steps": 25, "output_type": "np"}
rows = {
    "unconditional": {"condition_unet": False, "guidance_scale": 0.0},
    "unconditional, scale 5": {"condition_unet": False, "guidance_scale": 5.0},
    "conditional, scale 1": {"guidance_scale": 1.0},
}

figure, axes = plt.subplots(len(rows), 1, figsize=(8, 2.2), layout="constrained")
for ax, (name, options) in zip(axes, rows.items()):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    images = pipe(
        **call, **options, generator=generators
    ).images  # (images, height, width, channels)
    ax.imshow(np.concatenate(images, axis=1), cmap="gray", vmin=0, vmax=1)
    ax.set(yticks=[], xticks=[])
    ax.set_ylabel(name, rotation=0, ha="right", va="center")
axes[-1].set_xticks([16 * (4 * i + 2) for i in range(3)], CORNERS)
plt.show()

# %% [markdown]
# The pipeline saves with all its parts, and loads in one line:

# %%
pipe.save_pretrained("my-model")
pipe = ClassifierGuidedPipeline.from_pretrained("my-model")

# %% [markdown]
# {doc}`/guides/sharing` uploads it to the Hub. Something went wrong? See {doc}`/guides/classifier_does_not_learn`,
# {doc}`/guides/oversaturated_colours` and {doc}`/guides/few_images`.
