# %% [markdown]
# # What is each part of the model worth?
# {{badge}}
#
# **Question.** Is it the encoder, the decoder or the pretraining that makes a good mask? First one decoder (Mask2Former) on
# several encoders and shares of the training data; then several architectures against each other: how good, how fast, and
# whether what they compute inside follows their family, their encoder, their pretraining or their score.

# %%
# {{setup}}

# %% [markdown]
# **Parameters.** `demo` trains small networks from random weights on the embedded *synthetic* set, in minutes on two CPU
# cores. Pretrained CLIP, DINOv2, MAE and full-size architectures on ISIC 2018 are one line away (a GPU is needed).

# %%
PRESET, DATA = os.environ.get("PRESET", "demo"), None
# PRESET, DATA = "small", "data/isic2018"  # first: !python dataset.py download --to data/isic2018

# %%
import pandas as pd
from IPython.display import Markdown, display

from experiments import load_config
from pictures import show
from studies import architectures, encoders


def settings(study):
    return load_config(study, ["--config", f"configs/{study}_{PRESET}.yaml", *(["--data", DATA] if DATA else [])])


# %% [markdown]
# ## Encoders
# Behind one decoder, Mask2Former's, stand encoders of several kinds: CLIP's, DINOv2's and MAE's Vision Transformers and a
# ResNet; in the demo all from random weights. Each is trained on a part of the images and on all of them, from several seeds. A
# training that has finished is never run again; `--dry-run` on the command line only says what is left, and how long it takes.

# %%
folder = encoders.run(settings("encoders"))

# %% [markdown]
# ## How good, on how much data, at what cost?
# Cells on a part of the data see its images so much oftener, so all make equally many steps. A part is drawn by the
# training's seed, and a smaller one lies within a larger one.

# %%
show(folder / "predictions.png")

# %%
show(folder / "data_curve.png")

# %%
show(folder / "costs.png")
show(folder / "confusion.png")

# %% [markdown]
# ## Architectures
# The same loop trains all of them; their recordings and those of their untrained twins are compared on the same test images.

# %%
place = architectures.run(settings("architectures"))
runs = pd.read_csv(place / "runs.csv")
runs.groupby("label", sort=False)[["train_iou", "validation_iou", "test_iou"]].mean().round(3)

# %%
show(place / "predictions.png")

# %%
show(place / "loss_curves.png")

# %% [markdown]
# Colour: *u*, 0 as far apart as untrained twins, 1 as close as another seed of the same network; the diagonal is the
# seed-to-seed similarity itself. Right: are pairs that share a family (an encoder, …) more alike than pairs that do not?

# %%
show(place / "matrix.png")
display(Markdown((place / "summary.md").read_text().split("## Do they compute the same?")[1].split("![")[0]))

# %% [markdown]
# ## On real images
# Five encoders of a small Mask2Former on 5, 25 and 100 % of 1,600 cropped ISIC 2018 images (a split of our own, 128 px, three
# seeds, two epochs' worth of steps): the Vision Transformers at random weights, MobileNetV2 with and without ImageNet's.

# %%
REAL = "results/encoders-isic2018_256"
show(f"{REAL}/data_curve.png")
scores = pd.read_csv(f"{REAL}/scores.csv").query("images == 'test'")
scores[["label", "fraction", "seeds", "iou", "low", "high", "miou", "class_accuracy"]].round(3)

# %%
REAL = "results/architectures-isic2018_256"
show(f"{REAL}/matrix.png")
show(f"{REAL}/costs.png")
scores = pd.read_csv(f"{REAL}/scores.csv").query("images == 'test'")
scores[["label", "seeds", "iou", "low", "high", "miou", "class_accuracy"]].round(3)

# %% [markdown]
# Short trainings of small networks: the tables rank what learns fast from few images, not what these architectures can
# reach. The full-size grids are `configs/encoders.yaml` and `configs/architectures.yaml`.
