"""What README and docs/ tell a reader to click on and to type: links lead somewhere, doors take the commands."""

import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest
from test_dataset import write

import dataset
import experiments
import inference
import train
from utils import InputError

PROJECT = Path(__file__).resolve().parents[1]
PAGES = [*(PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *PROJECT.glob("docs/*.md")]
# a place for the reader's own word, or the study that is made on its page (and run there by test_carry_on.py)
OPEN = re.compile(r"…|\bSTUDY\b|\bNAME\b|test_NAME|experiments\.py contrast")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line of a bash block and of every `python …` in a sentence, comments taken off."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        lines += [" ".join(span.split()) for span in re.findall(r"`(python [^`]+)`", prose)]
        for line in lines:
            whole = shlex.join(shlex.split(line, comments=True)).replace("'&&'", "&&")
            found += [(page.name, part.strip()) for part in whole.split("&&") if part.strip()]
    return list(dict.fromkeys(found))


COMMANDS = commands()


def refused_flags(words: list[str], known: set[str]) -> list[str]:
    flags = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    return sorted(flags - known - {"help"})


def parameters(function) -> set[str]:
    return set(inspect.signature(function).parameters)


def taken(script: str, words: list[str]) -> None:
    """Fail where a door would refuse these arguments; nothing is run."""
    if "--help" in words:
        return
    if script == "experiments.py":
        study = words.pop(0) if words and not words[0].startswith("-") else "universality"
        experiments.load_config(study, words)
    elif script == "train.py":
        train.load_config(words)
    elif script == "inference.py":
        assert not refused_flags(words, parameters(inference.infer))
    elif script == "dataset.py":
        known = {"check": parameters(dataset.check), "resplit": parameters(dataset.resplit)}
        known["download"] = {"dataset", "to", "splits", "base_url", "keep_archives"}
        assert not refused_flags(words[1:], known[words[0]])
    else:
        assert script in ("docs/build.py", "notebooks/build.py", "notebooks/empty_environment.py")


def names_what_exists(words: list[str]) -> bool:
    """Of `python -m MODULE …` and `pip install -r FILE …`: module and files are there."""
    module = words[words.index("-m") + 1] if "-m" in words[:3] and words[0].startswith("python") else None
    files = [word for word in words if re.fullmatch(r"(tests|benchmarks|configs)/[\w/]+(\.\w+)?|[\w-]+\.txt", word)]
    there = all((PROJECT / file).exists() for file in files)
    return there and (module is None or importlib.util.find_spec(module) is not None)


def test_the_pages_hold_many_commands():
    assert len(COMMANDS) > 50 and len({page for page, _ in COMMANDS}) >= 8


@pytest.mark.parametrize("command", sorted({command for _, command in COMMANDS if not OPEN.search(command)}))
def test_a_command_is_taken_and_names_what_exists(command, monkeypatch):
    monkeypatch.chdir(PROJECT)
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z]+=\S+", word)]
    assert names_what_exists(words)
    if words[0] == "python" and words[1].endswith(".py"):
        assert (PROJECT / words[1]).is_file()
        taken(words[1], words[2:])
    elif words[0] == "accelerate":
        taken("train.py", words[words.index("train.py") + 1 :])
    else:
        assert words[0] in ("python", "pip", "source", "apt-get", "ruff", ".ci/run", "jupyter")


def test_a_command_that_a_door_refuses_would_be_found():
    with pytest.raises(InputError, match="segmentaton"):
        taken("experiments.py", ["universality", "--segmentaton", "1"])
    assert refused_flags(["--dta", "x"], parameters(dataset.check)) == ["dta"]
    assert not names_what_exists(["pip", "install", "-r", "requirement.txt"])


@pytest.mark.parametrize("door", [experiments, train, inference, dataset], ids=lambda door: door.__name__)
def test_doors_explain_themselves(door, capsys):
    with pytest.raises(SystemExit) as ended:
        door.main(["--help"])
    assert ended.value.code == 0 and "--" in capsys.readouterr().out


def test_check_and_resplit_do_as_the_readme_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ISIC_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "data", "Training", range(6))
    assert dataset.main(["check", "--data", str(tmp_path / "data")]) == 0
    dealt = ["--training", "3", "--validation", "1", "--test", "2"]
    assert not dataset.main(["resplit", "--data", str(tmp_path / "data"), "--to", str(tmp_path / "anew"), *dealt])
    capsys.readouterr()
    assert dataset.main(["check", "--data", str(tmp_path / "anew")]) == 0
    assert "train" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- links


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names under which headings are linked to: small letters, spaces to hyphens, other signs dropped."""
    titles = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page):
    lost = []
    for target in re.findall(r"\]\((?!http)([^)]+)\)", prose(page)):
        file, _, heading = target.partition("#")
        place = (page.parent / file) if file else page
        if not place.exists() or (heading and heading not in anchors(place)):
            lost.append(target)
    assert not lost


def test_a_reader_finds_every_page_from_the_readme():
    linked = set(re.findall(r"\]\((docs/\w+\.md)", (PROJECT / "README.md").read_text(encoding="utf-8")))
    assert linked == {f"docs/{page.name}" for page in PROJECT.glob("docs/*.md")}


def test_every_named_file_exists():
    there = {path.name for path in PROJECT.rglob("*.*")}
    for page in PAGES:
        named = re.findall(r"`((?:[\w.]+/)*[\w]+\.(?:py|yaml|ipynb|txt))`", page.read_text(encoding="utf-8"))
        lost = [name for name in named if Path(name).name not in there and "NAME" not in name]
        assert not lost, f"{page.name}: {lost}"
