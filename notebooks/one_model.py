# %% [markdown]
# # {{title}} on skin lesions
# {{badge}}
#
# **Question.** How well does {{kind}}, {{title}}, outline skin lesions? It is one of the two models whose
# insides `mech_interp_experiment.ipynb` compares; what is trained here is used there.

# %%
# {{setup}}

# %% [markdown]
# **Parameters.** `demo` trains small models on the embedded *synthetic* dermoscopy set, in minutes on two CPU cores.
# The published protocol on ISIC 2018 is one line away (a GPU is wise).

# %%
PRESET, DATA = os.environ.get("PRESET", "demo"), None
# PRESET, DATA = "isic2018", "data/isic2018"  # first: !python dataset.py download --to data/isic2018

# %%
from pathlib import Path

import pandas as pd
import torch
from IPython.display import Image, Markdown, display

import pictures
import visualization
from dataset import make_loader
from experiments import load_config
from inference import picture, score
from loss_metrics import summarize
from model_sites import sites
from models import TITLES, load_model, parameter_count
from studies import universality
from utils import resolve_device

MODEL = "{{model}}"
config, datasets, folder = universality.prepare(
    load_config("universality", ["--config", f"configs/{PRESET}.yaml", *(["--data", DATA] if DATA else [])])
)
member = next(m for m in universality.members(config) if m.recipe.model == MODEL)
pd.DataFrame({"images": {name: len(data) for name, data in datasets.items()}})

# %% [markdown]
# ## What the images look like
# Pairs of image and mask are matched by their id, resized once, and kept in a cache. The outline is the mask.

# %%
chosen = [datasets["train"][i] for i in range(5)]
pictures.gallery(
    torch.stack([sample.image for sample in chosen]).numpy(),
    torch.stack([sample.mask for sample in chosen]).numpy(),
    [sample.id for sample in chosen],
    caption=f"Training images at {config.image_size} px, flipped and turned as in this epoch.",
    synthetic=config.is_synthetic,
)

# %% [markdown]
# ## Training
# {{training}}

# %%
run = universality.train_member(config, member, datasets, folder)
history = pd.read_csv(run / "history.csv")
visualization.training_curves(
    history.assign(model=TITLES[MODEL], seed=member.seed),
    caption=f"{len(datasets['train'])} training and {len(datasets['validation'])} validation images.",
    synthetic=config.is_synthetic,
)

# %% [markdown]
# ## The test images
# Scores are per image, then averaged; intervals are bootstrapped over images. The thresholded Jaccard, the ISIC
# challenge's own, counts an image as 0 when its IoU is below 0.65.

# %%
model, _ = load_model(run / "best")
model.to(resolve_device(config.device))
metrics, logits = score(model, make_loader(datasets["test"], config.batch_size))
display(summarize(metrics).round(3))
picture(datasets["test"], logits, metrics, TITLES[MODEL], synthetic=config.is_synthetic)

# %% [markdown]
# ## Where it fails
# The four test images with the lowest IoU.

# %%
worst = metrics.nsmallest(4, "iou")
place = {image: i for i, image in enumerate(datasets["test"].ids)}
failures = [datasets["test"][place[image]] for image in worst["id"]]
pictures.example_predictions(
    torch.stack([sample.image for sample in failures]).numpy(),
    torch.stack([sample.mask for sample in failures]).numpy(),
    {TITLES[MODEL]: torch.stack([logits[image] for image in worst["id"]]).numpy() > 0},
    worst["id"].tolist(),
    {TITLES[MODEL]: worst["iou"].tolist()},
    title="Where does it fail?",
    caption=f"The four lowest of {len(metrics)} test images.",
    synthetic=config.is_synthetic,
)

# %% [markdown]
# ## On real images
# The same loop with a fuller recipe (`configs/segmentation_{{model}}.yaml`: augmentation, averaged weights, a schedule) on
# 1,600 real ISIC 2018 images, with 300 others as the test. The images stay where they are; committed are the numbers.
# `python experiments.py segmentation --config configs/segmentation_{{model}}.yaml --data FOLDER` makes them again.

# %%
real = Path("results/segmentation-isic2018_256-{{model}}")
display(
    Markdown((real / "summary.md").read_text(encoding="utf-8").replace("# ", "### ")),
    Image(real / "learning_curves.png"),
)

# %% [markdown]
# ## Where it can be listened to
# The sites whose activations the comparison records, in the order in which they fire{{sites}}

# %%
every, trainable = parameter_count(model)
print(f"{every / 1e6:.1f} million parameters, {trainable / 1e6:.1f} of them trained")
pd.DataFrame(
    [
        (site.part, site.name, " × ".join(map(str, site.shape)), " ".join(a for a in site.axes if a != "batch"))
        for site in sites(model, config.image_size)
    ],
    columns=["part", "site", "shape", "axes"],
)

# %% [markdown]
# **Next:** {{next}}
