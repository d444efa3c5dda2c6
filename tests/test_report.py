"""The explorer page: what it gathers is what the tables say, and nothing that a folder holds breaks it."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from made_results import make_results, make_universality
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.spatial.distance import squareform

import experiments
from report import explained, steps
from report.gather import gather
from report.page import SCRIPTS, as_json, page_text
from report.tables import packed_column, rounded
from utils import HOME, InputError

HOSTILE = "</script><script>window.hacked=1</script>\u2028<img src=x onerror=window.hacked=1>"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return make_results(tmp_path_factory.mktemp("made") / "results")


def sections(found):
    return {name: len(found[name]) for name in ("planes", "stitching", "legacy", "explanations", "steps", "matrices")}


def test_every_study_is_found_by_its_tables_and_not_by_its_name(results, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for number, folder in enumerate(sorted(results.iterdir())):
        (moved / f"run{number}").symlink_to(folder, target_is_directory=True)
    assert sections(gather([moved])) == sections(gather([results])) == dict.fromkeys(sections(gather([results])), 1)


def test_numbers_on_the_committed_page_are_those_of_the_tables_to_four_digits():
    found = gather([HOME / "results"])
    assert 1_000_000 < len(page_text(found).encode()) < 8_000_000
    assert min(count for name, count in sections(found).items() if name != "steps") >= 1
    assert [run["problems"] for run in found["runs"] if run["problems"]] == []
    for entry in found["planes"]:
        table = pd.read_csv(HOME / "results" / entry["folder"] / "pairs.csv")
        shown = entry["pairs"]["columns"]
        for name in ("similarity", "u", "ceiling_low", "p_value", "null_high"):
            values = np.array([np.nan if value is None else value for value in shown[name]])
            np.testing.assert_allclose(values, table[name], rtol=6e-4)
        facts = set(pd.read_csv(HOME / "results" / entry["folder"] / "sites.csv")["site"])
        assert set(table["site_a"]) | set(table["site_b"]) <= facts
        words = shown["site_b"]
        assert [words["levels"][code] for code in words["codes"]] == table["site_b"].tolist()


def test_what_was_run_names_data_and_commit(results):
    (run,) = gather([results / "universality"])["runs"]
    assert run["commit"] == "0123456789ab" and run["synthetic"] is True
    assert run["data"] == [["test", 24, "feedfeedfeedfeed"]] and ["permutations", "20"] in run["settings"]


def test_pictures_are_never_taken_over_from_a_run_on_real_images(tmp_path):
    make_universality(tmp_path / "run")
    assert gather([tmp_path])["planes"][0]["pictures"]["address"].startswith("data:image/png;base64,")
    (tmp_path / "run" / "config.yaml").write_text("data: data/isic2018\nmodels: []\n")
    assert gather([tmp_path])["planes"][0]["pictures"] is None


def test_a_place_of_somebodys_machine_is_not_shown(tmp_path):
    make_universality(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("data: /somewhere/private/isic\nmodels: []\n")
    assert "private" not in as_json(gather([tmp_path / "run"]))


@pytest.mark.parametrize(
    ("table", "text", "words"),
    [
        ("summary", "", "summary.csv cannot be read"),
        ("pairs", "estimator,policy,site_a\n1,2,3\n", "pairs.csv has no column part_a"),
        (
            "depth",
            "estimator,policy,part_a,relative_depth,similarity,floor,ceiling,u\na,b,c,d,e,f,g,h\n",
            "has words where",
        ),
        ("sites", "model,site,axes,shape,depth\n", "sites.csv has no rows"),
        ("stitching", "receiver,site_b,kind,kept\n\x00\xff,,,\n", "stitching.csv"),
    ],
)
def test_a_damaged_table_is_a_sentence_and_the_rest_is_shown(results, tmp_path, table, text, words):
    folder = make_results(tmp_path / "results") / "universality"
    (folder / f"{table}.csv").write_bytes(text.encode("latin-1"))
    found = gather([tmp_path / "results"])
    (run,) = [run for run in found["runs"] if run["folder"] == "universality"]
    assert any(words in problem for problem in run["problems"])
    assert len(found["explanations"]) == len(found["matrices"]) == 1
    page_text(found)


@pytest.mark.parametrize("study", ["universality", "explanations-synthetic", "processing-steps-synthetic"])
def test_a_folder_that_lacks_any_one_of_its_files_still_makes_a_page(tmp_path, study):
    folder = make_results(tmp_path / "results") / study
    for path in sorted(folder.iterdir()):
        held = path.read_bytes()
        path.unlink()
        as_json(gather([folder]))
        path.write_bytes(held)


@pytest.mark.parametrize("file", ["config.yaml", "environment.json", "data.json", "pca_rgb.json"])
@pytest.mark.parametrize("text", ["[1, 2]", "{broken: [", "a: !!python/object/apply:os.getcwd []"])
def test_damaged_settings_are_a_sentence(tmp_path, file, text):
    make_universality(tmp_path / "run")
    (tmp_path / "run" / file).write_text(text)
    (run,) = gather([tmp_path])["runs"]
    assert any(file in problem for problem in run["problems"]) or file == "pca_rgb.json"


def test_names_from_tables_cannot_leave_the_data_element(tmp_path):
    found = gather([make_results(tmp_path / "results", HOSTILE)])
    text = as_json(found)
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text)["planes"][0]["sites"]["columns"]["site"]["levels"][0] == HOSTILE
    assert page_text(found).count("window.hacked") == text.count("window.hacked")


def test_the_page_is_one_file_that_asks_for_nothing(results):
    page = page_text(gather([results]))
    head = page[: page.index("<style>")]
    assert "default-src 'none'" in head and "connect-src" not in head
    own = page.replace(page[page.index("<script>") : page.index('<script type="application/json"')], "")
    assert (
        not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", own) and "@import" not in own and "fetch(" not in own
    )
    assert len(page.encode()) < 8_000_000


def test_the_door_writes_the_page_and_replaces_its_own(results, tmp_path, capsys):
    for _ in range(2):
        experiments.main(["report", "--results", f'["{results}"]', "--out", str(tmp_path / "page.html")])
    assert "from 5 results folders" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count('id="stamp"') == 1


def test_the_tree_is_scipys_and_its_leaves_order_the_networks(results):
    pairs = pd.read_csv(results / "explanations-synthetic" / "pairs.csv")
    tree = explained.tree_of(pairs)
    square, _ = explained._whole(pairs)
    joined = linkage(squareform(square.to_numpy()), "average")
    assert sorted({max(line["y"]) for line in tree["lines"]}) == pytest.approx(sorted(joined[:, 2]), rel=1e-3)
    heights = pd.DataFrame(squareform(cophenet(joined)), square.index, square.columns)
    first, *_, last = tree["order"]
    assert set(tree["order"]) == set(square.index) and heights.loc[first, last] == joined[-1, 2]
    assert sorted({x for line in tree["lines"] for x in line["x"] if x == int(x)}) == [0, 1, 2, 3]


def test_networks_without_all_pairs_stand_beside_the_tree_and_are_named():
    rows = [("a", "b", 0.1), ("a", "c", 0.5), ("b", "c", 0.6), ("a", "d", np.nan), ("b", "d", 0.2)]
    tree = explained.tree_of(pd.DataFrame(rows, columns=["model_a", "model_b", "dissimilarity"]))
    assert tree["left_out"] == ["d"] and tree["order"][-1] == "d" and len(tree["lines"]) == 2


def test_planes_of_steps_keep_every_value_at_its_place(results):
    table = pd.read_csv(results / "processing-steps-synthetic" / "planes.csv")
    (entry,) = gather([results / "processing-steps-synthetic"])["steps"]
    assert entry["values"] == ["both", "a_to_b", "b_to_a", "linear_cka", "mutual_knn"] and len(entry["planes"]) == 3
    assert entry["images"] == 40
    for shown in entry["planes"]:
        rows = table[(table["network_a"] == shown["a"]) & (table["network_b"] == shown["b"])].reset_index()
        assert [shown["sites_a"][code] for code in shown["row_a"]] == rows["site_a"].tolist()
        assert shown["values"]["a_to_b"] == pytest.approx(rows["a_to_b"].tolist(), rel=5e-3)


def test_too_many_planes_are_left_out_and_counted(results, monkeypatch):
    monkeypatch.setattr(steps, "MOST_VALUES", 6 * 5)
    (entry,) = gather([results / "processing-steps-synthetic"])["steps"]
    assert len(entry["planes"]) == 1 and entry["left_out"] == 2


def test_a_tree_that_cannot_be_made_is_a_sentence(tmp_path):
    folder = make_results(tmp_path) / "explanations-synthetic"
    pairs = pd.read_csv(folder / "pairs.csv")
    pairs.assign(dissimilarity=-pairs["dissimilarity"]).to_csv(folder / "pairs.csv", index=False)
    found = gather([folder])
    assert found["explanations"][0]["trees"][0]["lines"] == []
    assert "gives no tree of occlusion: a dissimilarity is negative" in found["runs"][0]["problems"][0]


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (0.123456, 4, 0.1235),
        (0, 4, 0),
        (1e-20, 4, 1e-20),
        (12345.6, 4, 12350),
        (-0.04, 1, -0.04),
        (np.nan, 4, None),
        (np.inf, 4, None),
    ],
)
def test_numbers_are_rounded_to_significant_digits(value, digits, expected):
    assert rounded(value, digits) == expected


def test_absent_words_have_no_level():
    packed = packed_column(pd.Series(["b", None, "a", "b"]))
    assert packed == {"levels": ["b", "a"], "codes": [0, -1, 1, 0]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--results", '["nowhere"]'], "results: no folder nowhere"),
        (["--results", "[]"], "give existing folders"),
        (["--out", "page.txt"], "out must be the name of an .html file"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        experiments.main(["report", *arguments])


def test_a_folder_without_results_and_a_page_of_somebody_else_are_refused(results, tmp_path):
    with pytest.raises(InputError, match="run a study first"):
        experiments.main(["report", "--results", f'["{tmp_path}"]', "--out", str(tmp_path / "page.html")])
    (tmp_path / "mine.html").write_text("<p>my own page</p>")
    with pytest.raises(InputError, match="is there and is no page of ours"):
        experiments.main(["report", "--results", f'["{results}"]', "--out", str(tmp_path / "mine.html")])
    assert (tmp_path / "mine.html").read_text() == "<p>my own page</p>"


def test_every_script_beside_the_page_is_in_it():
    assert sorted(SCRIPTS) == sorted(path.name for path in (HOME / "report").glob("*.js"))
