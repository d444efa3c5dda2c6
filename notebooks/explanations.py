# %% [markdown]
# # Do the models look at the same things?
# {{badge}}
#
# **Question.** Networks that were trained on the same images answer much alike. Do they look at the same places to do so, and
# do CNNs look where other CNNs look, transformers where other transformers do? Four methods explain each network's answer for
# the same images. Before their maps are compared, each method has to show that it tells of the network at all.

# %%
# {{setup}}

# %% [markdown]
# **Parameters.** `demo` trains small networks from random weights on the embedded *synthetic* set (or finds them trained), and
# explains them in minutes on two CPU cores. Real images are one line away, once there are networks trained on them.

# %%
PRESET, DATA = os.environ.get("PRESET", "demo"), None
# PRESET, DATA = "isic", "data/isic2018"  # first: the two studies that configs/explanations_isic.yaml names

# %%
import json

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display

from experiments import load_config
from explanations.attributions import cost, explain, sites_at_depths
from explanations.pictures import explanation_grid
from explanations.targets import class_logit, masked_logit
from pictures import show
from similarity import Site
from studies import classifiers, explanations
from studies import explanation_words as words
from studies.explained_images import choose
from studies.subjects import subjects_of

# %% [markdown]
# ## What is explained
# One number that the network gives for an image: of these networks, which outline lesions, the lesion's log-odds summed over
# the pixels inside the mask. Positive attribution (orange) speaks for the lesion, negative (purple) against it.
#
# Three of the four methods ask what happens when a part of the image is missing, so it must be said what stands in its place:
# here the image's mean colour. Grad-CAM needs no such baseline, but a place in the network to be asked at.

# %%
config = load_config(
    "explanations", ["--config", f"configs/explanations_{PRESET}.yaml", *(["--data", DATA] if DATA else [])]
)
config.networks = config.networks or {str(explanations.train_first(config)): []}
subjects = subjects_of(config.networks, leave_out=config.leave_out)
one_each = list({subject.family: subject for subject in reversed(subjects)}.values())[::-1]
chosen = choose(config, "segmentation", config.images, [s.image_size for s in one_each], seed=config.seed).first(4)
pd.DataFrame([(s.label, s.family, s.seed) for s in subjects], columns=["network", "family", "seeds"]).groupby(
    ["network", "family"], sort=False
)["seeds"].agg(lambda seeds: ", ".join(map(str, seeds))).reset_index()

# %% [markdown]
# One image, one network of each family. Log-odds of networks differ in size, and methods in unit: every map is shown as percent
# of its own absolute sum.


# %%
def percent(maps):
    """The first image's map, its absolute values summing to 100."""
    return (100 * maps[0] / maps[0].abs().sum()).numpy()


settings = {
    "integrated_gradients": {"steps": 32},
    "grad_cam": {},
    "kernel_shap": {"features": 4, "samples": 128},
    "occlusion": {"features": 8},
}
maps, stated = {}, {}
for subject in one_each:
    model, images = subject.load(), chosen.at(subject.image_size)
    target = masked_logit(images.masks > 0, which="true", ids=images.ids)
    maps[f"{subject.name}, {subject.family}"] = of_methods = {}
    for method, given in settings.items():
        site = {"site": sites_at_depths(model, subject.image_size, [1.0])[1.0]} if method == "grad_cam" else {}
        found = explain(method, model, images.pixels, target, **given, **site)
        of_methods[words.titled(method)], stated[method] = percent(found.maps), found.settings
show(
    explanation_grid(
        images.pixels[0].numpy(),
        maps,
        mask=(images.masks[0, 0] > 0).numpy(),
        caption=f"Image {images.ids[0]}; each map in percent of its own absolute sum",
        synthetic=config.is_synthetic,
    )
)

# %% [markdown]
# What was asked, and what one image costs in passes through the network. A study says its cost before it begins.

# %%
for method, given in settings.items():
    cells = {"features": given["features"] ** 2} if "features" in given else {}
    stated[method] = {**stated[method], **cost(method, **given | cells)._asdict()}
pd.DataFrame(stated).fillna("")

# %% [markdown]
# ## Two promises, and a network whose answer is known
# The maps of Integrated Gradients sum to the change of the target from baseline to image (*completeness*), up to the steps of
# the path; KernelSHAP's do so however few coalitions are asked (*efficiency*), and have a sampling error instead.


# %%
def missed(found):
    """What a map lacks of the sum it promises, as a share of it; the median over images."""
    return f"{(found.gap / (found.maps.sum((1, 2)) - found.gap)).abs().median():.1e}"


rows = []
for steps in (4, 16, 64):
    found = explain("integrated_gradients", model, images.pixels, target, steps=steps)
    rows.append(("integrated_gradients", f"{steps} steps", missed(found), "–"))
for samples in (48, 128, 512):
    found = explain("kernel_shap", model, images.pixels, target, features=4, samples=samples)
    error = (found.errors.norm(dim=1) / found.values.norm(dim=1)).median()
    rows.append(("kernel_shap", f"{samples} coalitions", missed(found), f"{error:.1g}"))
pd.DataFrame(rows, columns=["method", subject.name, "misses of the sum", "sampling error"])

# %% [markdown]
# A network that reads the upper left quarter and nothing else: what lies outside it counts for nothing. Grad-CAM weighs whole
# channels, and so it marks what looks alike wherever it is: its map says what the layer sees, not what the answer uses.


# %%
class Quarter(torch.nn.Module):
    """Its one logit is what it sees in the upper left quarter of the image."""

    def __init__(self):
        super().__init__()
        self.see = torch.nn.Conv2d(3, 8, 1)

    def forward(self, images):
        side = images.shape[-1] // 2
        return self.see(images).relu()[..., :side, :side].mean((1, 2, 3))[:, None]


torch.manual_seed(0)
quarter, side = Quarter(), images.pixels.shape[-1] // 2
sites = {"grad_cam": {"site": Site("see", "batch channel height width")}}
found = {
    method: explain(method, quarter, images.pixels, class_logit(0), **given, **sites.get(method, {})).maps
    for method, given in settings.items()
}
read = np.zeros((2 * side, 2 * side))
read[:side, :side] = 1
show(
    explanation_grid(
        images.pixels[0].numpy(),
        {"reads the upper left quarter": {words.titled(method): percent(each) for method, each in found.items()}},
        mask=read,
        title="What does a known network look at?",
        caption="Each map in percent of its own absolute sum",
        synthetic=config.is_synthetic,
    )
)
pd.Series(
    {
        words.titled(method): (each[:, :side, :side].abs().sum() / each.abs().sum()).item()
        for method, each in found.items()
    },
    name="share of the attribution in the quarter",
).to_frame().style.format("{:.0%}")

# %% [markdown]
# ## The study
# All networks, all methods, the same images. Explanations are kept in the results folder and never made twice.

# %%
folder = explanations.run(config)


# %%
def answer_of(folder):
    """The answer of a study's page, and how many explanations it is from."""
    page = (folder / "summary.md").read_text()
    return Markdown(page.split("\n\n")[1] + "\n\n" + page.split("## The answer\n")[1].split("\n## ")[0])


answer_of(folder)

# %% [markdown]
# *Chance* is what two networks' maps of **different** images score: lesions lie in the middle, so that is not 0. *u* is 0
# there and 1 where two seeds of one network are; where two seeds agree no more than chance there is no *u*.

# %% [markdown]
# ## Which networks explain alike?
# Average linkage of the dissimilarity √((1 − mean)² + variance); the colour of a name is its family.

# %%
show(folder / "map_kernel_shap.png")

# %% [markdown]
# Do the groups follow CNN, transformer, hybrid? The adjusted Rand index is 1 where they are the same groups and 0 where they
# agree as by chance. Labels are moved over whole networks with their seeds, so that two seeds that lie together prove nothing.

# %%
show(folder / "ari.png")
display(Markdown(words.group_words(pd.read_csv(folder / "clusters.csv").query("similarity == 'cosine'"))))

# %% [markdown]
# ## Are the explanations faithful?
# Cells are deleted from the image, the most important first, or put back onto the baseline. The score of a faithful map falls
# early and rises early; a random map is what it has to beat.

# %%
show(folder / "faithfulness.png")

# %% [markdown]
# And a map that tells of the network changes when its weights turn random, layer by layer from the output: rank correlation
# with the maps of the trained network, mean over the networks. From 0.5 on at the last level a method counts as failing
# on a network. Below: on how many networks it fails, and why.

# %%
levels = pd.read_csv(folder / "randomization.csv").pivot_table("rank_correlation", "variant", "level", sort=False)
levels.rename(words.titled).round(2)

# %%
faithful = pd.read_csv(folder / "faithfulness.csv").fillna({"failed": "does not fail"})
reasons = faithful.assign(failed=faithful["failed"].str.split("; ")).explode("failed", ignore_index=True)
pd.crosstab(reasons["variant"].map(words.titled), reasons["failed"])

# %% [markdown]
# ## By depth
# Grad-CAM at a quarter, half, three quarters and the end of each network, one image.

# %%
show(folder / ("depth_strips.png" if config.is_synthetic else "pictures/depth_strips.png"))

# %% [markdown]
# ## Do explanations agree where the rest does?
# A point is an image: how alike pairs of networks of different families explain it, against how alike they represent it and
# how much their masks overlap. Large lesions may make all three large; the second correlation is for equal area.

# %%
show(folder / "joined.png")

# %% [markdown]
# ## Classifiers
# The same study of small classifiers of synthetic photographs, convolutional and with attention: the target is now the logit
# of the photograph's class, and the mask is known only because the photographs are drawn.

# %%
small = "smoke" if PRESET == "smoke" else "demo"  # of the synthetic photographs there is no larger study
trained = classifiers.run(load_config("classifiers", ["--config", f"configs/classifiers_{small}.yaml"]))
own = ["--networks", json.dumps({str(trained): []}), "--out", f"{folder}-photos", "--data", "synthetic"]
photos = explanations.run(load_config("explanations", ["--config", f"configs/explanations_{small}.yaml", *own]))
accuracy = pd.read_csv(trained / "accuracy.csv").groupby(["family", "label"], sort=False)["top1"].mean()
display(accuracy.round(3).to_frame())
answer_of(photos)

# %%
show(photos / "map_kernel_shap.png")

# %% [markdown]
# ## On real images
# Trained networks on ISIC 2018 test images, and classifiers on photographs of Imagenette. Tables and plots only: the maps over
# the photographs themselves are written to `pictures/` of the results folder of whoever runs it.


# %%
def real(name):
    """What a committed study of real images found, by cosine."""
    place = f"results/{name}"
    tables = {table: pd.read_csv(f"{place}/{table}.csv") for table in ("explanations", "networks", "kinds", "clusters")}
    display(Markdown(words.counted(tables)))
    for tell, table in ((words.kind_words, "kinds"), (words.group_words, "clusters")):
        display(Markdown(tell(tables[table].query("similarity == 'cosine'"))))
    show(f"{place}/map_kernel_shap.png")
    show(f"{place}/ari.png")


real("explanations-isic2018_256")

# %%
real("explanations-imagenette")

# %% [markdown]
# `failing` is the share of the pairs with a network on which the method fails a check; read such a row as one about the method
# before reading it as one about the networks. A *p* above 0.05 from few networks says that nothing was demonstrated, not that
# there is nothing: `smallest p` is what perfect groups could have reached.
