# %% [markdown]
# # Do a CNN and a transformer, trained on the same task, learn the same representations?
# {{badge}}
#
# **Question.** UNet++ and Mask2Former outline the same skin lesions. Do their layers end up computing the same thing?
# A similarity of 0.3 alone says nothing: it may be chance, or as much as two seeds of one network share. So every
# number here stands on a ruler: **null** (images of one side permuted), **floor** (the untrained twins), **ceiling** (the
# same architecture from another seed).

# %%
# {{setup}}

# %% [markdown]
# **Parameters.** `demo`: small models from scratch on the embedded *synthetic* set, minutes on two CPU cores. The
# published protocol on ISIC 2018 is one line away (a GPU is wise).

# %%
PRESET, DATA = os.environ.get("PRESET", "demo"), None
# PRESET, DATA = "isic2018", "data/isic2018"  # first: !python dataset.py download --to data/isic2018

# %%
import pandas as pd
from IPython.display import Image, Markdown, display

from experiments import load_config
from model_sites import sites
from models import TITLES
from similarity import measures, plane
from studies import universality
from studies import universality_report as report
from studies import universality_words as words
from utils import resolve_device

config, datasets, folder = universality.prepare(
    load_config("universality", ["--config", f"configs/{PRESET}.yaml", *(["--data", DATA] if DATA else [])])
)
device = resolve_device(config.device)
names = report.titles(config)
print(universality.estimate(config, datasets))

# %% [markdown]
# ## 1. The networks
# Both architectures, two seeds each. Trainings that the other notebooks (or an earlier run) finished are found again.

# %%
trained = universality.members(config)
for member in trained:
    universality.train_member(config, member, datasets, folder)
metrics = universality.score_all(config, datasets["test"], folder, device)
metrics.groupby(["model", "seed"])[["iou", "dice", "accuracy", "thresholded_jaccard"]].mean().round(3)

# %% [markdown]
# Where they are about equally good at the task, a difference inside is no difference in success.
#
# ## 2. Where we listen
# Every block of encoder and decoder, in the order in which it fires. Axes are declared by the model: pooling Swin's
# tokens over the wrong axis, or taking Mask2Former's query axis for the batch, silently compares something else.

# %%
models = {
    member.recipe.model: universality.load_member(member, folder)
    for member in trained
    if member.seed == config.seeds[0]
}
pd.concat(
    [
        pd.DataFrame(
            [
                (
                    TITLES[name],
                    site.part,
                    site.name,
                    " × ".join(map(str, site.shape)),
                    " ".join(a for a in site.axes if a != "batch"),
                )
                for site in sites(model, config.image_size)
            ],
            columns=["model", "part", "site", "shape", "axes"],
        )
        for name, model in models.items()
    ],
    ignore_index=True,
).style.hide(axis="index")

# %% [markdown]
# ## 3. Recording
# Each test image is decoded once and passed through every network; a site's activation is averaged over space
# (`gap`), or area-resized to a 4 × 4 grid. A row belongs to an image id, and rows are only ever matched by id.

# %%
recordings = universality.record_all(config, datasets["test"], folder, device)
first = recordings[trained[0].name]["gap"]
print(f"{len(recordings)} networks × {len(first.names)} sites ({trained[0].name}) × {len(first)} images")

# %% [markdown]
# **Is the instrument sound?** A network against itself must score 1 at every site; unpaired rows must not pass.

# %%
itself = plane("linear_cka", first, first)
print(f"against itself, lowest of {len(first.names)} sites: {min(itself.values.diagonal()):.6f}")
X = first.matrix(first.names[-1])
print(f"a perfect match with its rows shuffled: {measures.linear_cka(X, X.flip(0)):+.3f}")
try:
    plane("linear_cka", first, first.select(ids=first.ids[:-1]))
except ValueError as refusal:
    print("other images:", refusal)

# %% [markdown]
# ## 4. All sites × all sites
# Debiased linear CKA between every site of one network and every site of the other. Beside it the same for the
# untrained twins, and what another seed of the same architecture would give.

# %%
found = universality.analyse(config, recordings, datasets, folder, device)
tables = found.tables
figures = report.plane_figures(config, found, names) | report.verdict_figures_of(config, found, names)
figures["plane_encoder"]

# %%
figures["plane_decoder"]

# %% [markdown]
# Grey cells cannot be told from chance: permuting the images of one side gives as much, all pairs of sites considered.
#
# Do other measures draw the same picture? Each is blind to something else: SVCCA and the CKAs to rotations, scale and
# shifts of the features, RSA with correlation distances only to their scale and order.

# %%
figures["measures"]

# %% [markdown]
# ## 5. What the ruler says
# Site pairs are matched by relative depth, a rule fixed before looking. The dot is the similarity with its interval over
# images; the band runs from untrained (floor) to another seed (ceiling).

# %%
figures["ruler"]

# %% [markdown]
# Along the depth, *u* says how far from untrained (0) to another seed (1) the two have come.

# %%
figures["position"]

# %% [markdown]
# ## 6. What the images alone explain, and where in the image it is
# Two networks may be alike because both see the same colours. `linear_cka_deconfounded` in the table below is the
# headline with the kernels of raw pixels, mask shape and mean colour regressed out of both sides.

# %%
display(Markdown(words.controls_table(tables["controls"])))

# %%
figures["regions"]

# %% [markdown]
# ## 7. One space, and one network from two
# Maps into one space are fitted on half of the images; shown is the other half. A line joins the two points of one image.

# %%
report.space_figure(config, found, datasets["test"], names)

# %% [markdown]
# Geometry is not function. Here a network goes on from another one's activation, through nothing but a 1×1 convolution.
# Where the site's mean alone (cross) keeps the Dice, skip connections carry it, and the stitch says little.

# %%
figures["stitching"]

# %% [markdown]
# Three principal components of a feature map become colours; the right map of each pair is rotated onto the left one.

# %%
pictures = report.picture_figures(config, folder, datasets["test"], device)
pictures["pca"]

# %% [markdown]
# ## The answer, for these models and these images

# %%
report.write(config, folder, datasets, metrics, found, device, quiet=True)
display(Markdown(words.sentence(config, tables["summary"], names).replace("\n", "\n\n")))
display(Markdown(words.short_table(tables["summary"])))

# %% [markdown]
# What the measures say, and by which invariance they may differ; then what to know before believing any of it.

# %%
display(Markdown(words.disagreement_table(tables["disagreement"])))
display(Markdown(words.card_table(tables["card"])))

# %% [markdown]
# ## The earlier study's numbers
# Its recipe (one query as the answer, rows of all calls appended, cut at random and so unpaired, an "SVCCA" without CCA, one
# bandwidth for two spaces), run twice on the same kind of networks, beside the corrected protocol on those very networks.
# `python experiments.py legacy` makes it; committed here is a run on *synthetic* images, whose published column only
# stands beside: other networks, other images.

# %%
Image("results/legacy-synthetic/legacy.png")

# %% [markdown]
# ## On real images
# The reference run (`configs/reference.yaml`): UNet++ from an ImageNet MobileNetV2 and a Mask2Former from scratch, three seeds
# each, 128 px, on 2,000 cropped ISIC 2018 images with a split of our own. Further figures lie in its results folder.

# %%
REFERENCE = "results/universality-isic2018_256-mobilenet_v2"
display(Image(f"{REFERENCE}/ruler.png"))
display(Markdown(words.short_table(pd.read_csv(f"{REFERENCE}/summary.csv"))))

# %% [markdown]
# Two seeds give one seed-to-seed pair an architecture, so intervals are over images only; with three seeds or more the
# spread over seeds is in them. On synthetic images the numbers speak of synthetic images only; `PRESET, DATA` above takes
# the same cells to ISIC 2018.
