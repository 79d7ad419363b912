"""`koff report`: what the page says, that it stands alone, that no folder breaks out of it."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.command_line import fail, succeed
from support.run_folders import NATS, RunFolder, curve, write, write_grid

from koff.commands import train
from koff.commands.report import html, png, runs, sections, svg
from koff.commands.report import write as module
from koff.commands.report.content import Lines, Page, Section, Series, Text
from koff.commands.report.html import DARK, HEATS, LIGHT, style
from koff.commands.report.markdown import plain
from koff.commands.report.write import write_report
from koff.evaluation.measures import BETTER_THAN_DENSE

VOID = {"meta", "path", "circle"}  # without an end: the last two close themselves
HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> $x_1$ | `a` [l](http://e.example)"
)


class Reader(HTMLParser):
    """Reads a page and refuses tags that do not match; collects text and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.attributes = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def read(path):
    """A page's reader, once it is known to stand alone."""
    text = path.read_text("utf-8")
    assert len(text.encode()) < 3_000_000
    page = Reader(text)
    known = {
        "html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "section", "div",
        "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "svg", "path", "text",
        "circle", "ul", "li", "details", "summary",
    }  # fmt: skip
    assert set(page.tags) <= known, "no scripts, frames, images or links"
    names = {name for _, name, _ in page.attributes}
    assert not {n for n in names if n.startswith("on")} and not names & {"href", "src", "style"}
    sheet = re.search("<style>(.*)</style>", text, re.DOTALL)[1]
    assert "url(" not in sheet and "@import" not in sheet
    assert "default-src 'none'" in text and 'name="viewport"' in text
    return page


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """koff, gates alone and dense with memories, three seeds each."""
    return write_grid(tmp_path_factory.mktemp("grid"))


def test_report_of_many_runs_says_what_was_found(grid, tmp_path):
    page = read(write_report(grid, tmp_path / "page.html"))
    for title in (
        "What was pruned where", "Perplexity", "Won back", "Swapped memories", "Training",
        "Attention on the memories", "Sizes", "Speed", "Settings",
    ):  # fmt: skip
        assert title in page.text, title
    assert "9 runs of models/tiny, 3 layers" in page.text
    # 16 of 64, 24 of 64 and 8 of 64 neurons are gone.
    assert "most in layer 1 (37.5 %), fewest in layer 2 (12.5 %)" in page.text
    dense, gates = (math.exp(NATS[name]) for name in ("dense", "gates"))
    shares = [(gates - math.exp(NATS["own"] + s)) / (gates - dense) for s in (0.0, 0.01, 0.02)]
    mean = sum(shares) / 3
    sd = math.sqrt(sum((share - mean) ** 2 for share in shares) / 2)
    assert f"{100 * mean:.1f}\u00a0±\u00a0{100 * sd:.1f}\u00a0%" in page.text
    # What a seed adds to the own memory's nats it adds on the dense model too.
    gain = (NATS["gates"] - NATS["own"]) - (NATS["dense"] - NATS["dense_own"])
    assert f"{gain:.4f}\u00a0±\u00a00.0000" in page.text
    cost = NATS["other"] - NATS["own"] - 0.01
    text = f"the own memory is the best one on 2 of 2 domains; another one costs {cost:.3f} nats"
    assert text in page.text
    missing = page.text.rpartition("Not in this page")[2].split("\n")
    assert [line.partition(":")[0] for line in missing if line] == [
        "Which neurons went", "Tasks", "Speed of the trained model"
    ]  # fmt: skip


def test_report_says_what_a_share_above_one_is(grid, tmp_path):
    folders = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in grid[:3]]
    sentence = BETTER_THAN_DENSE.capitalize()
    assert sentence not in read(write_report(folders, tmp_path / "a.html")).text
    for file in folders[0].glob("eval-*.json"):
        rows = json.loads(file.read_text("utf-8"))
        own = [row for row in rows if row["memory"] == row["domain"]]
        write(file, [row | ({"perplexity": 1.5} if row in own else {}) for row in rows])
    assert sentence in read(write_report(folders, tmp_path / "b.html")).text


def test_report_names_what_a_folder_does_not_have(tmp_path):
    folder = RunFolder(measured=False, attention=False).write(tmp_path / "run")
    (folder / "train_log.json").unlink()
    (folder / "recipe.json").unlink()
    assert succeed("report", folder).startswith("written: ")
    page = read(folder / "report.html")
    missing = page.text.rpartition("Not in this page")[2]
    for text in (
        "Perplexity on the test split: koff eval DIR --base --card",
        "Share won back by memories: needs the same recipe without memories",
        "Swapped memories",
        "koff analyse DIR --domain NAME --json DIR/attention-NAME.json",
        "no train_log.json",
        "no recipe.json",
    ):
        assert text in missing, text
    for title in ("Won back", "Training", "Settings"):
        assert f"\n{title}\n" not in page.text
    assert "What was pruned where" in page.text and "Sizes" in page.text


def test_report_as_markdown_draws_pictures(grid, tmp_path):
    written = write_report(grid[:2], tmp_path / "page.md")
    text = written.read_text("utf-8")
    pictures = re.findall(r"!\[[^\n]*\]\((page-figures/[\w.-]+\.png)\)", text)
    assert len(pictures) == len(set(pictures)) >= 5
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (tmp_path / "page-figures").iterdir()} == {
        name.split("/")[1] for name in pictures
    }
    assert "## Won back" in text and "76.8" not in text  # that is the mean of three seeds
    before = {name: (tmp_path / name).read_bytes() for name in pictures}
    write_report(grid[:2], written)
    assert before == {name: (tmp_path / name).read_bytes() for name in pictures}


@pytest.mark.parametrize("field", ["base", "domain", "recipe", "attention", "log"])
def test_report_shows_hostile_texts_as_text(field, tmp_path, monkeypatch):
    folder = RunFolder(base=HOSTILE if field == "base" else "tiny").write(tmp_path / "run")
    if field == "domain":
        rows = json.loads((folder / "eval-test.json").read_text("utf-8"))
        write(folder / "eval-test.json", [row | {"domain": HOSTILE} for row in rows])
    if field == "recipe":
        values = json.loads((folder / "recipe.json").read_text("utf-8"))
        values["recipe"]["model"] = HOSTILE
        write(folder / "recipe.json", values)
    if field == "attention":
        values = json.loads((folder / "attention-fr.json").read_text("utf-8"))
        write(folder / "attention-fr.json", values | {"domain": HOSTILE, "memory": HOSTILE})
    if field == "log":
        entry = {"step": 3, "loss": HOSTILE, HOSTILE: 1.0}
        write(
            folder / "train_log.json", {"seconds": HOSTILE, "history": [entry, HOSTILE, *curve()]}
        )
    page = read(write_report([folder], tmp_path / "page.html"))
    shown = field in ("base", "domain", "recipe", "attention")
    assert ("alert(1)" in page.text) == shown
    monkeypatch.setattr(module, "draw", lambda chart, path: path.touch())  # it takes seconds
    text = write_report([folder], tmp_path / "page.md").read_text("utf-8")
    assert "<script" not in re.sub(r"\\<", "", text)
    assert not re.search(r"(?<!\\)\]\((?!page-figures/)", text), "no links but to its own pictures"


def test_pictures_show_hostile_texts_as_text(tmp_path):
    chart = Lines(
        "t", HOSTILE, "$", [Series("_" + HOSTILE, [(0, 0.1)]), Series("$\\frac{$", [(0, 1)])]
    )
    png.draw(chart, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_report_plain_text_in_markdown():
    assert plain("a|b <i> [x](y) $z$\n# t") == r"a\|b \<i\> \[x\](y) \$z\$ \# t"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("koff.json", "{", "koff.json must be JSON"),
        ("recipe.json", "[]", "recipe.json must hold a JSON object"),
        ("train_log.json", "nan", "train_log.json must be JSON"),
        ("eval-test.json", "{}", "eval-test.json must hold a JSON list"),
        ("eval-test.json", '[{"memory": 3}]', "'results' in eval-test.json must be rows"),
        ("attention-fr.json", '{"domain": "fr"}', "attention-fr.json must be as koff analyse"),
        ("attention-fr.json", '{"domain": "fr", "memory": "fr", "heads": [[1e999]]}', "analyse"),
        ("attention-fr.json", '{"domain": "fr", "memory": "fr", "heads": [[0.1]]}', "got 1"),
    ],
)  # fmt: skip
def test_report_refuses_damaged_files(name, content, message, tmp_path):
    folder = RunFolder().write(tmp_path / "run")
    (folder / name).write_text(content, "utf-8")
    assert message in fail("report", folder)
    assert not (folder / "report.html").exists()


def test_report_follows_no_link_out_of_a_folder(tmp_path):
    folder = RunFolder().write(tmp_path / "run")
    for name in ("eval-test.json", "recipe.json", "train_log.json", "attention-fr.json"):
        other = (folder / name).rename(tmp_path / "elsewhere.json")
        (folder / name).symlink_to(other)
        assert f"{name} must lie in its folder, got a link" in fail("report", folder)
        (folder / name).unlink()
        other.rename(folder / name)
    succeed("report", folder)


def test_report_leaves_out_what_is_no_measurement(tmp_path):
    folder = RunFolder().write(tmp_path / "run")
    rows = json.loads((folder / "eval-test.json").read_text("utf-8"))
    bad = [math.nan, math.inf, -1.0, 0.5, 10**400, None, 1e999]
    for row, value in zip(rows, bad, strict=False):
        row["perplexity"] = value
    write(folder / "eval-test.json", [*rows[:5], {"memory": None, "perplexity": 3.0,
                                                  "bits_per_byte": 1.0}, *rows[5:]])  # fmt: skip
    log = {
        "seconds": math.nan,
        "history": [{"step": math.inf, "loss": 1}, {"step": 1, "loss": 10**400}],
    }
    write(folder / "train_log.json", log)
    with pytest.raises(ValueError, match="must be rows of koff.evaluate"):
        write_report([folder])  # a whole number beyond what a float holds
    rows[4]["perplexity"] = 2.0
    write(folder / "eval-test.json", rows)
    page = read(write_report([folder], tmp_path / "page.html"))
    assert not re.search(r"\b(nan|inf|infinity)\b", page.text, re.IGNORECASE)
    assert "Training" not in page.text


def test_report_refuses_what_cannot_stand_on_one_page(tmp_path):
    one = RunFolder().write(tmp_path / "one")
    other = RunFolder(base="another").write(tmp_path / "other")
    assert "must be of the same base model, got models/tiny in one" in fail("report", one, other)
    third = RunFolder(seed=1).write(tmp_path / "third")
    rows = json.loads((third / "eval-test.json").read_text("utf-8"))
    write(third / "eval-test.json", [row | {"tokens": 999} for row in rows])
    message = fail("report", one, third)
    assert "on the same text, got 1000 tokens of 'en' in one and 999 in third" in message
    assert "must differ, got one of them twice" in fail("report", one, tmp_path / "." / "one")
    assert "must end in .html or .md, got 'a.pdf'" in fail("report", one, "--output", "a.pdf")
    assert "existing folder" in fail("report", one, "--output", tmp_path / "no" / "a.html")
    assert not list(tmp_path.rglob("*.html"))


def test_report_of_a_huge_run_stays_small(tmp_path):
    names = tuple(f"memory{i:03d}" for i in range(120))
    folder = RunFolder(memories=names, history=curve(20_000)).write(tmp_path / "run")
    values = json.loads((folder / "recipe.json").read_text("utf-8"))
    values["recipe"]["data"] = {name: {"train": "x.jsonl"} for name in names}
    write(folder / "recipe.json", values)
    page = read(write_report([folder], tmp_path / "page.html"))
    assert "Left out: 99 more columns" in page.text and "more lines" in page.text
    line = max((value for _, name, value in page.attributes if name == "d"), key=len)
    assert line.count("L") <= 301


def test_report_shows_no_folder_of_this_machine(tmp_path):
    folder = RunFolder(base="/home/me/secret/tiny").write(tmp_path / "run")
    page = read(write_report([folder], tmp_path / "page.html"))
    assert "koff: tiny" in page.text and "en.train.jsonl" in page.text
    assert not re.search("secret|somewhere|data/en", page.text)


def test_overlap_of_masks_by_hand(tmp_path):
    a, b = (
        runs.read_finished(RunFolder(seed=seed).write(tmp_path / str(seed)), "test")
        for seed in (0, 1)
    )
    kept = [[0, 1, 2], [0, 1], [0]], [[0, 1, 3], [2, 3], [0]]
    for run, rows in zip((a, b), kept, strict=True):
        run.manifest.dense_widths, run.manifest.widths = [4, 4, 1], [3, 2, 1]
        run.manifest.kept = rows
    # pruned: {3}, {2, 3}, {} and {2}, {0, 1}, {}; by chance 1 * 1 / 4 + 2 * 2 / 4 of 3
    assert sections.overlap(a, b) == (0.0, 1.25 / 3)
    assert sections.overlap(a, a) == (1.0, 1.25 / 3)
    b.manifest.kept = [[0, 1, 4], [2, 3], [0]]
    with pytest.raises(ValueError, match="3 different ones below 4 in each layer"):
        sections.overlap(a, b)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.3, 0.2), (3.1, 3.2), (1e-7, 2e-7), (5, 5e6)])
def test_ticks_are_few_and_inside(low, high):
    found = svg.ticks(low, high)
    assert 2 <= len(found) <= 6 and low - 1e-9 <= found[0] < found[-1] <= high * (1 + 1e-9)


@pytest.mark.parametrize("points", [[(0, 1.0)], [(0, 2.0), (1, 2.0)], [(0, 0.0), (1, 0.0)]])
def test_a_chart_of_equal_values_is_drawn(points):
    drawn = svg.lines(Lines("t", "x", "y", [Series("a", points, *([[1.0] * len(points)] * 2))]))
    assert "nan" not in drawn and ("circle" in drawn) == (len(points) == 1)


def luminance(colour):
    """Relative luminance as WCAG defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    """Contrast of two colours, 1 to 21."""
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_report_colours_can_be_read(theme):
    for name, least in {"ink": 4.5, "dim": 4.5, **{f"s{i}": 3.0 for i in range(6)}}.items():
        assert contrast(theme[name], theme["page"]) >= least, name
    red, green, blue, alpha = re.search(
        rf"\.h{HEATS} {{ background: rgba\((\d+), (\d+), (\d+), ([\d.]+)\)", style()
    ).groups()
    below = [int(theme["page"][i : i + 2], 16) for i in (1, 3, 5)]
    mixed = [
        round(float(alpha) * int(c) + (1 - float(alpha)) * p)
        for c, p in zip((red, green, blue), below, strict=True)
    ]
    assert contrast(theme["ink"], "#{:02x}{:02x}{:02x}".format(*mixed)) >= 4.5


def test_report_of_a_training_is_written_at_its_end(trained):
    page = read(trained / "report.html")
    for title in ("What was pruned where", "Training", "Sizes", "Speed", "Settings"):
        assert f"\n{title}\n" in page.text
    assert "koff eval DIR --base --card" in page.text


def test_report_shows_what_koff_eval_and_analyse_wrote(trained, tmp_path):
    succeed("eval", trained, "--base", "--json", trained / "eval-test.json")
    succeed("analyse", trained, "--domain", "fr", "--json", trained / "attention-fr.json")
    succeed("report", trained, "--output", tmp_path / "page.html")
    page = read(tmp_path / "page.html")
    rows = json.loads((trained / "eval-test.json").read_text("utf-8"))
    for row in rows:
        assert f"{row['perplexity']:.2f}" in page.text
    assert "Attention on the memories" in page.text and "Swapped memories" in page.text


def test_a_page_that_cannot_be_written_undoes_no_training(tmp_path, caplog):
    output = RunFolder().write(tmp_path / "out")
    (output / "report.html").mkdir()
    train._write_page(output)
    assert "the model is saved, but not the page about it: report: " in caplog.text


LOOK = """<!doctype html><body style="margin:0">
<iframe id="f" style="border:0;width:%dpx;height:900px" srcdoc="%s"></iframe><script>
document.getElementById("f").onload = event => {
  const page = event.target.contentDocument, root = page.documentElement;
  const charts = [...page.querySelectorAll("svg.chart")].map(c => c.getBoundingClientRect());
  const texts = [...page.querySelectorAll("p, h1, li")].map(e => e.getBoundingClientRect().right);
  document.title = JSON.stringify({
    width: root.scrollWidth, seen: root.clientWidth, charts: charts.length,
    narrowest: Math.min(...charts.map(c => c.width)), widest: Math.max(...charts.map(c => c.right)),
    text: Math.max(...texts), ink: getComputedStyle(page.body).color,
    loaded: performance.getEntriesByType("resource").length });
};</script></body>"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [320, 360, 1100])
def test_report_in_chromium_fits_the_screen(width, grid, tmp_path):
    page = write_report(grid, tmp_path / "page.html").read_text("utf-8")
    frame = LOOK % (width, page.replace("&", "&amp;").replace('"', "&quot;"))
    (tmp_path / "look.html").write_text(frame, "utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--dump-dom",
        "--window-size=1200,1000",
    ]
    command = ["chromium", *options, f"--user-data-dir={tmp_path}/profile"]
    seen = subprocess.run(
        [*command, (tmp_path / "look.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    found = json.loads(re.search("<title>(.*)</title>", seen.stdout)[1])
    assert width - 20 <= found["seen"] <= width  # beside a scroll bar
    assert found["width"] <= found["seen"], "no scrolling sideways"
    assert found["charts"] >= 8 and found["widest"] <= width and found["text"] <= width
    assert found["narrowest"] >= 250 and found["loaded"] == 0
    ink = tuple(int(LIGHT["ink"][i : i + 2], 16) for i in (1, 3, 5))
    assert found["ink"] == "rgb({}, {}, {})".format(*ink)


def test_report_is_one_page(tmp_path):
    text = html.html(Page("t", [Section("s", [Text("a < b & c")])], ["x"]))
    assert "a &lt; b &amp; c" in text and Reader(text).open == []


def test_koff_analyse_neurons_and_its_page(trained, tmp_path):
    output = succeed("analyse", trained, "--neurons", "--json", trained / "neurons.json",
                     "--max-tokens", 300)  # fmt: skip
    assert "specific to fr" in output and "others" in output
    found = json.loads((trained / "neurons.json").read_text("utf-8"))
    assert found["sentence"] in output and found["languages"] == ["en", "fr"]
    assert sum(layer["neurons"] for layer in found["layers"]) == 2 * 64
    gone = sum(layer["specific_pruned"] + layer["others_pruned"] for layer in found["layers"])
    assert gone == 2 * 64 - sum(runs.read_finished(trained, "test").manifest.widths)
    page = read(write_report([trained], tmp_path / "page.html"))
    assert "Which neurons" in page.text and found["sentence"] in page.text
    some = '{"rates": {"a": {"neurons": 1}}, "layers": [], "sentence": "s"}'
    bad = [json.dumps(found | change) for change in ({"layers": []}, {"sentence": 3})]
    for text in ("{}", some, *bad):
        (trained / "neurons.json").write_text(text, "utf-8")
        assert "neurons.json must be as koff analyse" in fail("report", trained)
    (trained / "neurons.json").unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "there must be --domain (with --memory) or --neurons, got neither"),
        (("--neurons", "--domain", "fr"), "got both"),
        (("--neurons", "--memory", "fr"), "got both"),
        (("--domain", "fr", "--max-tokens", "3"), "--max-tokens must come with --neurons"),
        (("--neurons", "--split", "validation"), "at least two domains with a validation split"),
    ],
)
def test_koff_analyse_refuses_wrong_options(options, message, trained):
    assert message in fail("analyse", trained, *options)


def test_koff_analyse_neurons_needs_a_pruned_model(root, tmp_path):
    output = tmp_path / "dense"
    succeed("train", root / "recipe.yaml", "--output", output, "--sparsity", 0, "--steps", 1)
    assert "--neurons must have a pruned model" in fail("analyse", output, "--neurons")
