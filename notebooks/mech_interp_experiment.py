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
from IPython.display import Markdown, display

from experiments import load_config
from model_sites import sites
from models import TITLES
from similarity import measures, plane
from studies import universality
from studies import universality_report as report
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
trained = universality.members(config, trained=True)
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
planes = universality.compare_all(config, recordings, folder)
tables = universality.calibrate(config, recordings, planes)
figures = report.plane_figures(config, planes, tables["pairs"], names)
figures["plane_encoder"]

# %%
figures["plane_decoder"]

# %% [markdown]
# Do other measures draw the same picture? Each is blind to something else: SVCCA and the CKAs to rotations, scale and
# shifts of the features, RSA with correlation distances only to their scale and order.

# %%
figures["measures"]

# %% [markdown]
# ## 5. What the sites see
# Three principal components of a feature map become colours; the right map of each pair is rotated onto the left one.

# %%
pictures = report.picture_figures(config, folder, datasets["test"], device)
pictures["pca"]

# %% [markdown]
# ## 6. What the ruler says
# Site pairs are matched by relative depth, a rule fixed before looking. The dot is the similarity, its bar the range
# over pairs of seeds; the grey band runs from untrained (floor) to another seed (ceiling).

# %%
report.ruler_figure(config, tables["summary"], names)

# %%
report.depth_figure(config, tables["depth"], names)

# %% [markdown]
# ## The answer, for these models and these images

# %%
report.write(config, folder, datasets, metrics, planes, tables, device, quiet=True)
display(Markdown(report.sentence(config, tables["summary"], names).replace("\n", "\n\n")))
display(Markdown(report.short_table(tables["summary"])))

# %% [markdown]
# *u* says how far from untrained (0) to another seed (1) the two architectures have come. The range is over seeds, not
# yet an interval over images, and two seeds give one seed-to-seed pair an architecture. On synthetic images the numbers
# speak of synthetic images only; `PRESET, DATA` above takes the same cells to ISIC 2018.
