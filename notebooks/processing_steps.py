# %% [markdown]
# # How do they get there?
# {{badge}}
#
# **Question.** Two networks answer alike. Did they take the same steps to the answer? Between image and answer a network makes
# one representation after another; here the paths of CNNs and transformers, trained with labels, without them, or to segment,
# are laid side by side: are two networks most alike at the same depth, who changes smoothly, and what of the image is lost on
# the way?

# %%
# {{setup}}

# %% [markdown]
# **Parameters.** `demo` trains tiny networks from random weights on embedded *synthetic* sets (or finds them trained): minutes
# on two CPU cores. Real images are one line away, once there are networks trained on them.

# %%
PRESET, DATA = os.environ.get("PRESET", "demo"), None
# PRESET, DATA = "isic", "data/isic_resplit"  # first: the studies that configs/processing_steps_isic.yaml names

# %%
import pandas as pd
import torch
from IPython.display import Markdown

from experiments import load_config
from pictures import show
from processing import figures
from processing.planes import imbalance_planes, similarity_planes
from similarity import Site, record
from studies import processing_steps
from studies import processing_words as words
from studies.processing_work import ENCODER, kept_recording

# %% [markdown]
# ## What is compared
# Take an image, and the image that is nearest to it in representation A. How near is that one in B? *Information imbalance*
# Δ(A → B) is its mean rank in B, scaled: next to 0 where A's nearest images are B's as well, 1 where A says nothing of B. It
# has two directions: a representation that has lost something is told by the one before it, and does not tell it.
#
# Three chains of seven steps whose answers are known, on 200 random points of six numbers: rotations, which lose nothing; one
# number dropped at a time; and rotations with one step that keeps a single number, the bottleneck.


# %%
def chain(*maps):
    """A network of linear maps, one after the other."""
    layers = [torch.nn.Linear(6, 6, bias=False) for _ in maps]
    for layer, weights in zip(layers, maps):
        layer.weight = torch.nn.Parameter(weights)
    return torch.nn.Sequential(*layers)


torch.manual_seed(0)
points = torch.randn(200, 6)
turns = [torch.linalg.qr(torch.randn(6, 6))[0] for _ in range(7)]
drops = [torch.eye(6).where(torch.arange(6) < 7 - max(step, 1), 0.0) for step in range(7)]
narrow = [*turns[:3], turns[3] * (torch.arange(6)[:, None] < 1), *turns[4:]]
chains = {"rotations": turns, "a number less each": drops, "bottleneck": narrow}
sites = [Site(str(step), "batch channel") for step in range(7)]
walked = {name: record(chain(*maps), [(points, list(map(str, range(200))))], sites) for name, maps in chains.items()}

# %%
show(
    figures.planes(
        {f"{name}, from | {name}, to": imbalance_planes(path, path) for name, path in walked.items()},
        title="What is lost on the way?",
        label="information imbalance",
        caption="Δ of each step (down) with each step (across) of the same chain; 200 random points, k = 1",
        synthetic=True,
        value="a_to_b",
        best=False,
    )
)

# %% [markdown]
# Nothing is lost by rotations: dark everywhere. Where numbers are dropped, what lies above the diagonal stays low (from early to
# late: the early one knows) and what lies below grows with the distance. After the bottleneck the later steps know each
# other, and of what was before it next to nothing.
#
# ## Which networks, where, and on which images
# Each body (its first convolution to its last block) is trained as a *classifier*, without labels by SimCLR
# (*self-supervised*), and as the encoder of a *segmentation* network, fine-tuned from the classifier. Its *untrained* twin has
# the random weights that training began with. Two seeds of each. All see the same images, which none was trained on.

# %%
config = load_config(
    "processing_steps", ["--config", f"configs/processing_steps_{PRESET}.yaml", *(["--data", DATA] if DATA else [])]
)
folder = processing_steps.run(config)

# %%
names = ["networks", "sites", "relations", "families", "largest", "matched", "losses"]
tables = {name: pd.read_csv(folder / f"{name}.csv") for name in names}
data = "Synthetic images" if config.is_drawn else f"Images of {config.data}"
found = f"{words.counts(tables['networks'])}. {data}, n = {tables['largest']['n_images'].iloc[0]}.\n\n"
Markdown(found + words.network_words(tables["networks"]))

# %% [markdown]
# The *sites* are every block's output, in the order in which they fire; relative depth is the place among a network's own
# encoder sites. One network's, with its stages and what has been spent (parameters that have been used, operations for one
# image) by the time each fires:

# %%
first = tables["networks"]["network"].iloc[0]
columns = ["network", "site", "part", "shape", "stage", "depth", "parameters", "operations"]
tables["sites"].query("network == @first")[columns].style.hide(axis="index").format(precision=2)

# %% [markdown]
# ## Are two networks most alike at the same depth?
# One CNN against one transformer for each training. Dots and squares are best matches; were they all at equal depth, they would
# lie on the dashed line.

# %%
show(folder / "planes.png")

# %% [markdown]
# All pairs. Above, how far from equal depth the best match is: chance is what shuffled sites would give. Below, what is not shared
# at matched depth (every site with the nearest in depth, a rule fixed before looking). Another seed of the same network is the
# ceiling of what can be shared, pairs of untrained networks are the floor: what comes with the bodies alone.

# %%
show(folder / "matched_depths.png")
encoders = tables["relations"][tables["relations"]["part"] == ENCODER]
Markdown(words.relation_words(encoders[~encoders["training"].str.contains("×")], ENCODER))

# %% [markdown]
# *told*: the share of pairs whose best matches are nearer than shuffled sites'. That alone says little: neighbouring sites are
# alike in any network, so that even one that is run *backwards* may be nearer than chance. Where along the depth do two
# differ most?

# %%
Markdown(words.largest_words(tables["largest"], tables["networks"]))

# %% [markdown]
# ## Who changes smoothly?
# Each line is a network, each point the change into one site; by depth, and by what the step costs.

# %%
show(folder / "smoothness.png")

# %% [markdown]
# A network whose blocks are small looks smooth, so the rule that chooses the sites matters: here are three of them. A body is one
# dot and one unit of the test, however many layers or seeds it has.

# %%
show(folder / "families.png")
tested = tables["families"].query("part == @ENCODER and rule == 'every block'")
Markdown(words.family_words(tested))

# %% [markdown]
# *smallest p*: what families that do not overlap at all would get. With two bodies of a family that is 1/3: a small study cannot
# say that families differ, and a large *p* here says nothing.
#
# ## What is kept of the image?
# R² of a linear read-out from each site, on images it was not fitted to: brightness, contrast, colour, edges and spectrum, and
# of the lesion its size, place, shape and border. Untrained networks are the floor.

# %%
show(folder / "kept.png")

# %% [markdown]
# *Late* is the third quarter of the depth, *last* the last site, *lost* their difference; *learnt* is how much more the last site
# keeps than that of the untrained twin.

# %%
groups = tables["losses"][tables["losses"]["statistic"].isin(["low-level", "lesion"])]
Markdown(words.loss_words(groups))

# %% [markdown]
# ## Before and after
# A segmentation network's encoder began as the classifier of the same seed. Depth by depth, what did fine-tuning leave? The
# recordings are kept in the results folder, so that they can be asked more than the study does.

# %%
both = [tables["networks"].query("training == @training") for training in ("classifier", "segmentation")]
pairs = both[0].merge(both[1], on=["body", "seed"], suffixes=("_a", "_b")).drop_duplicates("body")
planes = {}
for a, b in zip(pairs["network_a"], pairs["network_b"]):
    before, after = (kept_recording(name, folder).select(part=ENCODER) for name in (a, b))
    planes[f"{a} | {b}"] = similarity_planes(before, after, config.k, neighbours=config.neighbours)
show(
    figures.planes(
        planes,
        title="What does fine-tuning leave as it was?",
        label="information imbalance, mean of both directions",
        caption=f"Classifier (down) and the segmentation network that it became (across), encoder sites, {config.policy}, "
        f"k = {config.k}; dots and squares: best matches",
        synthetic=config.is_drawn,
    )
)

# %% [markdown]
# At matched depth, with intervals over images, beside the strangers' numbers above:

# %%
near = tables["matched"].query("value == 'both' and part == @ENCODER")
own = near.merge(pairs[["network_a", "network_b"]]).query("quantity != 'best match'")
own.pivot(index="network_a", columns="quantity", values=["estimate", "low", "high"]).swaplevel(axis=1).sort_index(
    axis=1, level=0, sort_remaining=False
).round(2)

# %% [markdown]
# ## The answer

# %%
kind = "These are **synthetic** images and tiny networks" if config.is_drawn else f"These are images of {config.data}"
Markdown(f"{words.answer(tables)}\n\n{kind}, n = {tables['largest']['n_images'].iloc[0]}.")

# %% [markdown]
# What tiny networks do with drawn lesions shows how the questions are asked, and is no finding about networks. The same study
# of larger ones on real images is in [`results/processing-steps-isic2018_256`](results/processing-steps-isic2018_256/summary.md);
# what every number means, and the traps, in [`docs/processing_steps.md`](docs/processing_steps.md).
