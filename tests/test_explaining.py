"""Explanations made once: what is found again, what makes them anew, and what is refused while the rest goes on."""

import dataclasses
import json

import pytest
import torch
from made_networks import RESNET, classifiers_of
from safetensors.torch import save_file
from torch import nn

from classification.photos import synthetic_photos
from explanations.targets import Target, class_logit
from similarity import Site
from sources import ImageSource
from studies import explaining, explanation_work
from studies.explained_images import Images, choose
from studies.explaining import Made, keep, known, make, path_of, time_passes
from studies.explanation_checks import Checks
from studies.explanation_ways import refuse_one_folder, slug, ways_of
from studies.explanation_work import Job
from studies.subjects import CLASSIFICATION, networks_in
from utils import InputError

METHODS = {
    "kernel_shap": {"features": 2},
    "occlusion": {"features": 2},
    "integrated_gradients": {"steps": 2, "images": 4},
    "grad_cam": {"depths": [0.5, 1.0], "images": 4},
}


# -------------------------------------------------------------------------------------------------------- what is asked


def test_a_method_is_called_by_its_name_or_by_any_name():
    found = ways_of(
        {"kernel_shap": {"features": 3, "images": 7}, "blurred": {"method": "occlusion", "baseline": "blur"}}, 9
    )
    assert [(way.name, way.method, way.images) for way in found] == [
        ("kernel_shap", "kernel_shap", 7),
        ("blurred", "occlusion", 9),
    ]
    assert dict(found[0].settings) == {"features": 3, "samples": 100, "baseline": "mean"}  # all of them written down
    assert dict(found[1].settings) == {"features": 5, "baseline": "blur"}


def test_grad_cam_has_a_variant_for_each_depth():
    (way,) = ways_of({"grad_cam": {"depths": [0.25, 1.0]}}, 3)
    assert way.variants == ["grad_cam, 25 %", "grad_cam, 100 %"] and way.depths == (0.25, 1.0)


@pytest.mark.parametrize(
    ("method", "settings", "forward", "backward"),
    [
        ("occlusion", {"features": 3}, 10, 0),
        ("kernel_shap", {"features": 2}, 16, 0),  # all coalitions of four cells
        ("kernel_shap", {"features": 5, "samples": 80}, 82, 0),
        ("kernel_shap", {"features": "superpixels:20", "samples": 80}, 82, 0),
        ("integrated_gradients", {"steps": 7}, 9, 7),
        ("grad_cam", {}, 1, 1),
    ],
)
def test_the_passes_of_an_image_are_the_methods(method, settings, forward, backward):
    (way,) = ways_of({method: settings}, 5)
    assert way.passes == (forward, backward)


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        ({}, "methods: none is given; choose from integrated_gradients"),
        ({"kernel_shop": {}}, "unknown method 'kernel_shop'; closest: 'kernel_shap'"),
        ({"mine": {"method": "lime"}}, "unknown method 'lime'"),
        ({"occlusion": {"samples": 5}}, "'occlusion': unknown setting 'samples'; closest: 'images'"),
        ({"kernel_shap": {"feature": 5}}, "unknown setting 'feature'; closest: 'features'"),
        ({"occlusion": {"images": 0}}, "images must be 1 to 9, the number that is chosen; got 0"),
        ({"occlusion": {"images": 10}}, "images must be 1 to 9"),
        ({"occlusion": {"images": True}}, "images must be 1 to 9"),
        ({"occlusion": {"features": 0}}, "'occlusion': features must be a number of cells a side"),
        ({"occlusion": {"features": "superpixels"}}, "or superpixels:40; got 'superpixels'"),
        ({"integrated_gradients": {"steps": 0}}, "steps must be a whole number of at least 1, got 0"),
        ({"integrated_gradients": {"baseline": "black"}}, "unknown baseline 'black'; choose from mean, blur"),
        ({"kernel_shap": {"features": 5, "samples": 20}}, "20 samples cannot tell 25 features apart"),
        ({"grad_cam": {"depths": 0.5}}, "depths must be different shares"),
        ({"grad_cam": {"depths": []}}, "depths must be different shares"),
        ({"grad_cam": {"depths": [0.5, 0.5]}}, "depths must be different shares"),
        ({"grad_cam": {"depths": [1.5]}}, "depths must be different shares"),
        (
            {"IG blur": {"method": "occlusion"}, "IG_blur": {"method": "occlusion"}},
            "'IG_blur' would be called as those",
        ),
        ({"checks": {"method": "occlusion"}}, "the files of 'checks' would be called as those of 'checks'"),
        ({"α": {"method": "occlusion"}}, "the files of 'α' would be called by no letter; rename"),
    ],
)
def test_what_no_network_can_be_asked_is_refused_with_a_sentence(methods, sentence):
    with pytest.raises(InputError, match=sentence):
        ways_of(methods, 9)


def test_networks_that_would_share_a_folder_are_refused():
    with pytest.raises(
        InputError, match=r"networks: the files of 'A · b \(0\)' would be called as those of 'A, B \(0\)'"
    ):
        refuse_one_folder("networks", ["A, B (0)", "C (0)", "A · b (0)"])
    assert slug("Mask2Former, ViT (0)") == "Mask2Former_ViT_0"


# ------------------------------------------------------------------------------------------------- kept and found again


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    source = ImageSource(data=str(synthetic_photos(root / "photos", {"train": 1, "val": 3}, 32)))
    networks = {"Conv": ("resnet18", RESNET, "CNN")}
    folder = classifiers_of(root / "networks", networks, size=32)
    chosen = choose(source, CLASSIFICATION, 8, [32])
    job = Job(chosen, ways_of(METHODS, 8), Checks(5, 4, 4, 2, "mask"), "true", None, 8, 0, "cpu")
    return networks_in(folder)[0], job, root / "out"


@pytest.fixture
def passes(monkeypatch):
    """How many pictures go through classifiers."""
    from classification.classifiers import Classifier

    counted, real = [], Classifier.forward

    def forward(self, images):
        counted.append(len(images))
        return real(self, images)

    monkeypatch.setattr(Classifier, "forward", forward)
    return counted


@pytest.fixture
def made(study):
    subject, job, folder = study
    explanation_work.work(subject, job, folder, True)
    return study


def test_everything_is_made_once_and_then_no_picture_is_asked_about_again(study, passes):
    subject, job, folder = study
    explanation_work.work(subject, job, folder, True)
    least = sum(way.images * way.passes[0] for way in job.ways)
    assert sum(passes) > least
    passes.clear()
    explanation_work.work(subject, job, folder, True)
    assert passes == [] and not explanation_work.missing(subject, job, folder, True)


def test_kept_maps_are_the_ones_that_were_made(made):
    subject, job, folder = made
    model, images = subject.load(), job.chosen.at(32)
    for way in job.ways:
        part = images.first(way.images)
        again = make(way, model, part, class_logit(part.classes), batch=3, seed=job.seed)  # of other batches
        found = explanation_work.kept(subject, way, job, folder)
        assert found.ids == job.chosen.ids[: way.images] and set(found.maps) == set(way.variants)
        for variant in way.variants:
            torch.testing.assert_close(found.maps[variant], again.maps[variant].float(), rtol=1e-3, atol=1e-5)


def test_other_weights_images_settings_seeds_and_targets_make_them_anew(made, tmp_path):
    subject, job, folder = made
    (shap, *_), chosen = job.ways, job.chosen
    assert explanation_work.kept(subject, shap, job, folder) is not None
    other = classifiers_of(tmp_path, {"Conv": ("resnet18", RESNET, "CNN")}, seeds=(1,))
    retrained = dataclasses.replace(subject, folder=networks_in(other)[0].folder)
    changes = {
        "weights": (retrained, shap, job),
        "setting": (subject, dataclasses.replace(shap, settings=shap.settings | {"samples": 12}), job),
        "images": (subject, shap, dataclasses.replace(job, chosen=dataclasses.replace(chosen, ids=chosen.ids[::-1]))),
        "pixels": (subject, shap, dataclasses.replace(job, chosen=dataclasses.replace(chosen, fingerprint="new"))),
        "number": (subject, dataclasses.replace(shap, images=7), job),
        "seed": (subject, shap, dataclasses.replace(job, seed=1)),
        "mask": (subject, shap, dataclasses.replace(job, mask="predicted")),
        "label": (subject, shap, dataclasses.replace(job, label=2)),
    }
    for name, (network, way, asked) in changes.items():
        assert explanation_work.kept(network, way, asked, folder) is None, name
    slower = dataclasses.replace(job, batch=2, device="auto")  # what maps do not depend on
    assert explanation_work.kept(subject, shap, slower, folder) is not None


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"[]", lambda b: b[:-1]])
def test_a_damaged_file_is_never_trusted(tmp_path, damage):
    path = tmp_path / "way.safetensors"
    keep(path, Made({"way": torch.rand(3, 4, 4)}, {}, {}, ("a", "b", "c"), {}, {}, 1.0), "key")
    assert known(path, "key") is not None and known(path, "another") is None
    path.write_bytes(damage(path.read_bytes()))
    assert known(path, "key") is None


def test_a_file_of_others_is_never_trusted(tmp_path):
    for about in (None, {"about": "null"}, {"about": "[]"}, {"about": "{"}, {"about": json.dumps({"key": "key"})}):
        save_file({"maps/way": torch.zeros(1, 2, 2)}, tmp_path / "way.safetensors", about)
        assert known(tmp_path / "way.safetensors", "key") is None, about


def test_a_damaged_file_is_made_anew_and_the_others_are_not(made, passes):
    subject, job, folder = made
    way = job.ways[1]
    before = explanation_work.kept(subject, way, job, folder).maps[way.name].clone()
    path = path_of(folder, subject, way.name, explaining.key(subject, job.chosen, way, job.asked))
    path.write_bytes(path.read_bytes()[:100])
    explanation_work.work(subject, job, folder, True)
    again = explanation_work.kept(subject, way, job, folder)
    assert torch.equal(before, again.maps[way.name])
    assert sum(passes) == way.images * way.passes[0]  # of this way alone; checks, recording, predictions are kept


def test_other_settings_do_not_take_the_place_of_the_maps_there_are(made, passes):
    subject, job, folder = made
    coarse = dataclasses.replace(job, ways=ways_of({"occlusion": {"features": 2}}, 8))
    fine = dataclasses.replace(job, ways=ways_of({"occlusion": {"features": 3}}, 8))
    for each in (fine, coarse, fine):
        explanation_work.work(subject, each, folder, False)
    asked = sum(passes)
    for each in (fine, coarse, job):
        explanation_work.work(subject, each, folder, each is job)
    assert sum(passes) == asked


def test_a_kill_in_the_middle_of_writing_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    def killed(_tensors, path, _about):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "way.safetensors"
    monkeypatch.setattr(explaining, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        keep(path, Made({"way": torch.zeros(1, 2, 2)}, {}, {}, ("a",), {}, {}, 1.0), "key")
    assert not path.exists() and known(path, "key") is None


def test_names_with_a_dot_have_files_of_their_own(study):
    subject, _, folder = study
    assert len({path_of(folder, subject, name, "0123456789") for name in ("blur:1.5", "blur:1.7", "blur")}) == 3


# ------------------------------------------------------------------------------------------------------ what is refused


class Bare(nn.Module):
    """A classifier of mean colours: its only site has no place."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, images):
        return self.head(images.mean((2, 3)))

    def default_sites(self):
        return [Site("head", ("batch", "channel"))]


class Cut(Bare):
    """One map, and no gradient flows from behind it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, images):
        with torch.no_grad():
            return self.head(self.conv(images).mean((2, 3)))

    def default_sites(self):
        return [Site("conv", ("batch", "channel", "height", "width"))]


class OneSite(Cut):
    def forward(self, images):
        return self.head(self.conv(images).mean((2, 3)))


class Broken(OneSite):
    """NaN for one picture."""

    def forward(self, images):
        logits = super().forward(images)
        return logits * torch.where(images[:, :1].mean((2, 3)) > 0.9, torch.nan, 1.0)


IMAGES = Images(tuple("abcd"), torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), None, None)


def all_of(model, images=IMAGES):
    torch.manual_seed(0)
    model = model().eval()
    return {way.name: make(way, model, images, class_logit(0), batch=4, seed=0) for way in ways_of(METHODS, 4)}


def test_without_a_map_there_is_no_grad_cam_and_the_rest_goes_on():
    made = all_of(Bare)
    assert made["grad_cam"].maps == {} and list(made["grad_cam"].refused) == ["grad_cam, 50 %", "grad_cam, 100 %"]
    assert "no site of this model has a map" in made["grad_cam"].refused["grad_cam, 50 %"]
    for name in ("kernel_shap", "occlusion", "integrated_gradients"):
        assert not made[name].refused and made[name].maps[name].shape == (4, 16, 16)


def test_a_network_that_cuts_gradients_is_refused_where_they_are_needed():
    made = all_of(Cut)
    assert "no gradient of the target" in made["integrated_gradients"].refused["integrated_gradients"]
    assert all("has no gradient" in why for why in made["grad_cam"].refused.values())
    assert not made["kernel_shap"].refused and not made["occlusion"].refused


def test_a_network_that_cuts_gradients_or_ignores_its_input_can_still_be_timed():
    class Ignores(Bare):
        def forward(self, images):
            return self.head(torch.zeros(len(images), 3))

    for model in (Cut(), Ignores()):
        forward, backward = time_passes(model, IMAGES, class_logit(0), 4)
        assert forward > 0 and backward >= 0


def test_two_depths_that_are_one_site_can_both_be_kept(tmp_path):
    made = all_of(OneSite)["grad_cam"]
    assert torch.equal(made.maps["grad_cam, 50 %"], made.maps["grad_cam, 100 %"])
    keep(tmp_path / "it.safetensors", made, "key")
    found = known(tmp_path / "it.safetensors", "key")
    assert torch.equal(found.maps["grad_cam, 50 %"], made.maps["grad_cam, 100 %"])
    assert (found.ids, found.settings, found.refused) == (made.ids, made.settings, {}) and found.finished


def test_maps_that_are_not_finite_are_refused_and_counted():
    pixels = IMAGES.pixels.clone()
    pixels[2] = 0.95
    made = all_of(Broken, dataclasses.replace(IMAGES, pixels=pixels))
    for name, variant in (("integrated_gradients", "integrated_gradients"), ("grad_cam", "grad_cam, 100 %")):
        assert variant not in made[name].maps
        assert "1 images hold NaN" in made[name].refused[variant]


def test_what_pytorch_refuses_in_the_middle_of_a_pass_is_a_reason_in_one_line():
    def score(model, images, rows):
        raise RuntimeError("out of luck\nsee above")

    (way,) = ways_of({"occlusion": {"features": 2}}, 4)
    made = make(way, Bare(), IMAGES, Target("it", score), batch=4, seed=0)
    assert made.refused == {"occlusion": "PyTorch stopped: out of luck"} and made.maps == {} and not made.finished


def test_too_little_memory_ends_the_run_with_the_remedy():
    def score(model, images, rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    (way,) = ways_of({"occlusion": {"features": 2}}, 4)
    with pytest.raises(InputError, match="memory does not suffice; lower batch_size"):
        make(way, Bare(), IMAGES, Target("it", score), batch=4, seed=0)


def test_a_refused_variant_is_listed_asked_again_and_then_checked(study, passes, tmp_path, monkeypatch):
    subject, job, _ = study
    job = dataclasses.replace(job, ways=ways_of({"occlusion": {"features": 2}, "grad_cam": {"depths": [1.0]}}, 8))
    real = explaining.grad_cams

    def full(*_args, **_options):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(explaining, "grad_cams", full)
    explanation_work.work(subject, job, tmp_path, True)
    gone = explanation_work.kept(subject, job.ways[1], job, tmp_path)
    assert gone.refused == {"grad_cam, 100 %": "PyTorch stopped: out of luck"}
    assert explanation_work.missing(subject, job, tmp_path, True)
    before = explanation_work.checked(subject, job, tmp_path, True)
    assert "grad_cam, 100 %" not in set(before["curves"]["variant"])
    passes.clear()
    monkeypatch.setattr(explaining, "grad_cams", real)
    explanation_work.work(subject, job, tmp_path, True)
    found = explanation_work.kept(subject, job.ways[1], job, tmp_path)
    assert not found.refused and found.maps["grad_cam, 100 %"].shape == (8, 32, 32)
    tables = explanation_work.checked(subject, job, tmp_path, True)
    assert all("grad_cam, 100 %" in set(table["variant"]) for table in tables.values())
    assert not explanation_work.missing(subject, job, tmp_path, True)


def test_what_never_works_is_not_asked_again(study, passes, tmp_path, monkeypatch):
    subject, job, _ = study
    job = dataclasses.replace(job, ways=ways_of({"occlusion": {"features": 2}, "grad_cam": {"depths": [1.0]}}, 8))

    def never(*_args, **_options):
        raise InputError("no map; choose another method")

    monkeypatch.setattr(explaining, "sites_at_depths", never)
    explanation_work.work(subject, job, tmp_path, True)
    passes.clear()
    explanation_work.work(subject, job, tmp_path, True)
    assert passes == [] and explanation_work.kept(subject, job.ways[1], job, tmp_path).maps == {}
    assert explanation_work.estimate([subject], job, tmp_path).startswith("All explanations of 1 networks are there")


def test_an_unknown_sampling_error_is_not_taken_for_none():
    """As many equations as unknowns: the fit leaves no residual from which to know the error."""
    torch.manual_seed(0)
    model = OneSite().eval()
    (way,) = ways_of({"kernel_shap": {"features": 3, "samples": 16}}, 4)  # eight pairs, nine features
    made = make(way, model, IMAGES, class_logit(0), batch=4, seed=1)
    assert made.refused or made.errors["kernel_shap"].isnan().all()
    (way,) = ways_of({"kernel_shap": {"features": 2}}, 4)  # every coalition
    assert make(way, model, IMAGES, class_logit(0), batch=4, seed=1).errors["kernel_shap"].tolist() == [0] * 4
