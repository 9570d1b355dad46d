"""The pictures, the page and the command that look inside a model."""

import base64
import json
import re
import shutil
import subprocess
import warnings
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest

import attention_jax
from attention_jax import analysis
from attention_jax.analysis import pictures
from attention_jax.laboratory import findings, inspect
from attention_jax.laboratory import subject as subjects
from attention_jax.training import experiment, metrics
from attention_jax.training.config import ConfigError, RunError, default_config

ROOT = Path(__file__).parent.parent
GPT2 = ROOT / "tests" / "huggingface" / "gpt2"
PNG = b"\x89PNG\r\n"
WORDS = ["The", " cat", "</script>", "\n$x$"]


def weights_of(seed, *shape):
    weights = np.tril(np.random.default_rng(seed).uniform(0.1, 1, shape))
    return weights / weights.sum(-1, keepdims=True)


MAPS = {"blocks_0/attention": weights_of(0, 2, 4, 4), "blocks_1/attention": weights_of(1, 3, 4, 4)}
EARLIER = {path: weights[:, ::-1, ::-1].swapaxes(1, 2) for path, weights in MAPS.items()}


# Pictures ----------------------------------------------------------------------------------------


def size_of(png):
    """Width and height, as the file itself says."""
    data = png.read_bytes()
    assert data.startswith(PNG)
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_a_picture_has_rows_of_layers_and_columns_of_heads(tmp_path):
    two = analysis.draw_maps(tmp_path / "a.png", MAPS, WORDS, caption="a row")
    one = analysis.draw_maps(tmp_path / "b.png", {"blocks_0/attention": weights_of(0, 1, 1, 4, 4)})
    (width, height), (small_width, small_height) = size_of(two), size_of(one)
    assert width > 2 * small_width > 2 * 300
    assert height > 1.5 * small_height


def test_a_heavy_weight_is_dark_where_it_stands(tmp_path):
    from matplotlib.image import imread

    weights = np.zeros((1, 8, 8))
    weights[0, 6, 1] = 1
    picture = imread(analysis.draw_maps(tmp_path / "a.png", {"x": weights}))[:, :, :3].sum(-1)
    bar = picture.shape[1] * 2 // 3  # The colour bar stands behind.
    down, across = np.nonzero(picture[:, :bar] < 0.9)
    blue = imread(tmp_path / "a.png")[down, across]
    down, across = down[blue[:, 2] > 0.3], across[blue[:, 2] > 0.3]  # Blue, not the black of text.
    assert down.mean() > picture.shape[0] * 0.5
    assert across.mean() < bar * 0.5


def test_many_heads_are_named_by_the_number_of_their_layer(tmp_path):
    maps = {f"blocks_{i}/attention": weights_of(0, 1, 5, 4, 4) for i in (1, 3)}
    svg = analysis.draw_maps(tmp_path / "a.svg", maps).read_text()
    assert "<!-- 1.4 -->" in svg
    assert "<!-- 3.0 -->" in svg
    data = data_of(analysis.write_page(tmp_path / "a.html", maps))
    assert [layer["number"] for layer in data["layers"]] == ["1", "3"]


def test_small_weights_of_a_long_row_are_seen(tmp_path):
    from matplotlib.image import imread

    def faintest(size):
        weights = np.full((1, size, size), 0.04)
        weights[0, 0, 0] = 1
        picture = imread(analysis.draw_maps(tmp_path / "a.png", {"x": weights}))
        return picture[picture.shape[0] // 3, picture.shape[1] // 3, 0]  # Red lacks in blue.

    assert faintest(65) < faintest(64) - 0.05


def test_a_few_wide_labels_are_turned_and_many_turn_all():
    for tokens, want in (
        (["a", "b", "\u200d", "d"], [False, False, True, False]),
        (["The", "cat", "sat", "."], [True] * 4),
        (["a", "b", "c", "d"], [False] * 4),
    ):
        labels = pictures._labels(tokens, 4)
        assert pictures._Grid(1, 2, 4, labels, labels, "").turned == want


@pytest.mark.parametrize("count", [33, 1024, 1025, 5000])
def test_a_long_row_has_a_few_places_on_its_axes(count):
    places, labels = pictures._labels(None, count)
    assert 4 < len(places) <= 8
    assert labels == [str(place) for place in places]


def test_letters_that_are_not_seen_have_labels():
    assert [pictures._word(x) for x in (" ", "\n", "\u200d", "\ufe0f", "\xa0", "é", "日")] == [
        *("␣", "⏎", "\\u200d", "\\ufe0f", "\\xa0", "é", "日")
    ]


def test_a_dollar_sign_begins_no_formula(tmp_path):
    odd = "$\\frac$ $_{"
    tokens = ["$", "$\\frac$", "a\\$", "\ud83d"]
    maps = {odd: MAPS["blocks_0/attention"], "x": MAPS["blocks_0/attention"]}
    for made in (
        analysis.draw_maps(tmp_path / "a.png", maps, tokens, caption=odd),
        analysis.draw_pruning(
            tmp_path / "b.png", [1, 0], [1, 0], [[1, 0]], measure=odd, caption=odd
        ),
        analysis.draw_phase(tmp_path / "c.png", [1, 2], {odd: [0, 1]}, {odd: [1, 0]}, caption=odd),
    ):
        assert min(size_of(made)) > 300
    svg = analysis.draw_maps(tmp_path / "a.svg", maps, tokens).read_text()
    assert all(f"<!-- {word} -->" in svg for word in ("$", r"$\frac$", r"a\$"))


def test_letters_are_drawn_in_any_installed_font_and_others_are_named_once(tmp_path, monkeypatch):
    from matplotlib import font_manager
    from matplotlib.image import imread

    tokens = ["a", "\u1d81", "\u1d84", "\u1d8a"]  # matplotlib brings a font that has them.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = imread(analysis.draw_maps(tmp_path / "a.png", MAPS, tokens))
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    with pytest.warns(UserWarning, match="no installed font") as told:
        boxes = imread(analysis.draw_maps(tmp_path / "b.png", MAPS, tokens))
    (line,) = [str(warning.message) for warning in told]
    assert line.startswith("b.png: no installed font has \u1d81 \u1d84 \u1d8a;")
    assert drawn.shape != boxes.shape or (drawn != boxes).any()


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((MAPS, WORDS[:3]), {}, "tokens must be one for each of the 4 positions.*got 3"),
        ((MAPS, WORDS), {"key_tokens": "ab"}, "key_tokens must be one for each.*got 2"),
        ((MAPS,), {"row": 1}, "row must be at most 0"),
        (({},), {}, "maps must have a layer at least, got none"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, arguments, options, words):
    with pytest.raises(ValueError, match=words):
        analysis.draw_maps(tmp_path / "a.png", *arguments, **options)


# The page ----------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path):
    by_step = {10: EARLIER, 20: MAPS}
    return analysis.write_page(tmp_path / "page.html", by_step, WORDS, title="<b>", caption="&")


def data_of(page):
    (text,) = re.findall(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_no_other_file(page):
    tags = Tags()
    tags.feed(page.read_text())
    for _, attributes in tags.found:
        assert not {"src", "href", "action", "data"} & set(attributes)
    assert not re.search(r"https?://|import\s*\(|fetch\(|@import|url\(", page.read_text())
    assert ("html", {"lang": "en"}) in tags.found
    assert "{{" not in page.read_text()
    assert "&lt;b&gt;" in page.read_text()


def test_the_page_holds_every_weight(page):
    data = data_of(page)
    assert data["steps"] == [10, 20]
    assert data["tokens"] == [WORDS]
    unit = (data["high"] - data["low"]) / 65535
    for packed, maps in zip(data["weights"], (EARLIER, MAPS), strict=True):
        for text, weights in zip(packed, maps.values(), strict=True):
            level = np.frombuffer(base64.b64decode(text), "<u2")
            found = data["low"] + unit * level.reshape(weights.shape)
            np.testing.assert_allclose(found, weights, atol=1e-5)
    entropy = analysis.map_statistics(MAPS)["blocks_1/attention"]["entropy"]
    np.testing.assert_allclose(data["statistics"][1][1]["entropy"], entropy, atol=1e-5)


@pytest.mark.parametrize(
    ("maps", "options", "words"),
    [
        ({}, {}, "maps must have a layer"),
        ({1: MAPS, 2: {"blocks_0/attention": MAPS["blocks_0/attention"]}}, {}, "maps of step 1"),
        ({3: {"x": np.full((1, 2, 2), np.nan)}}, {}, "maps of step 3 must be finite: x"),
        (MAPS, {"tokens": WORDS[:2]}, "tokens must be one for each"),
        (MAPS, {"tokens": [WORDS, WORDS]}, "tokens must be a row for each of 1 rows, got 2"),
        ({"x": np.zeros((400, 1, 300, 300), np.float16)}, {}, "maps have 36,000,000 weights"),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path, maps, options, words):
    with pytest.raises(ValueError, match=words):
        analysis.write_page(tmp_path / "page.html", maps, **options)


def test_words_of_a_template_and_numbers_that_json_lacks_are_shown_as_they_are(tmp_path):
    words = {"title": "{{caption}}", "caption": "--text={{data}}"}
    tokens = ["{{title}}", "</script>", "\ud83d", "\u2028"]
    odd = {path: {"score": [np.nan, np.inf, 1, 2][: len(x[0])]} for path, x in MAPS.items()}
    page = analysis.write_page(
        tmp_path / "a.html", {np.int64(5): MAPS}, tokens, statistics={np.int64(5): odd}, **words
    )
    text = page.read_text()
    assert text.count("<title>{{caption}}</title>") == text.count("<p>--text={{data}}</p>") == 1
    data = data_of(page)
    assert data["tokens"] == [tokens]
    assert data["steps"] == [5]
    assert data["statistics"][0][0]["score"][:2] == [None, None]


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no browser of the family of Chromium is installed")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom")

    def dom(address):
        run = subprocess.run([found, *flags, address], capture_output=True, text=True, timeout=60)
        return run.stdout

    return dom


def readout(dom):
    (weight,) = re.findall(r'<output id="readout"[^>]*data-weight="([-.\d]+)"', dom)
    return float(weight)


def test_a_browser_shows_the_weight_that_the_address_names(page, browser):
    dom = browser(f"{page.as_uri()}#layer=1&head=2&t=3&s=1&step=20")
    assert readout(dom) == pytest.approx(MAPS["blocks_1/attention"][2, 3, 1], abs=6e-5)
    assert "layer 1, head 2" in dom
    assert dom.count('aria-pressed="true"') == 1
    dom = browser(f"{page.as_uri()}#layer=0&head=1&t=2&s=2&step=10")
    assert readout(dom) == pytest.approx(EARLIER["blocks_0/attention"][1, 2, 2], abs=6e-5)


def test_clicks_keys_and_the_pointer_change_what_a_browser_shows(page, browser):
    program = """
      const press = (key, at = document) =>
        at.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      const map = document.getElementById("map"), seen = [];
      const note = () => seen.push(document.getElementById("readout").dataset.weight);
      document.getElementById("head-1-0").click();
      const at = (t, s, kind) => {
        const box = map.getBoundingClientRect();
        const zoom = box.width / parseFloat(map.style.width);
        map.dispatchEvent(new MouseEvent(kind, { clientX:
          box.left + zoom * (frame.left + (s + .5) * frame.cell),
          clientY: box.top + zoom * (4 + (t + .5) * frame.cell), bubbles: true }));
      };
      at(2, 1, "click"); note();
      at(3, 0, "mousemove"); note();
      map.dispatchEvent(new MouseEvent("mouseleave")); note();
      press("ArrowRight"); note();
      press("ArrowUp", map); note();
      press("["); note();
      document.getElementById("queries").children[3].click(); note();
      document.title = seen.join(" ");
    """
    text = page.read_text()
    page.write_text(text.replace("</body>", f"<script>{program}</script></body>"))
    (title,) = re.findall("<title>(.*?)</title>", browser(page.as_uri()))
    new, old = MAPS["blocks_1/attention"], EARLIER["blocks_1/attention"]
    want = [new[0, 2, 1], new[0, 3, 0], new[0, 2, 1], new[1, 2, 1], new[1, 1, 1], old[1, 1, 1]]
    want.append(old[1, 3].max())  # A token points at what it looks at most.
    np.testing.assert_allclose([float(x) for x in title.split()], want, atol=6e-5)


# The command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run with three checkpoints."""
    config = default_config("recall")
    config.task.update(seq_length=16, vocab_size=32, num_pairs=2)
    config.model.update(features=8, num_layers=1)
    config.train.update(epochs=3, steps_per_epoch=1, batch_size=4)
    config.checkpoint.update(every_epochs=1, keep=3)
    config.eval.num_batches = 1
    place = tmp_path_factory.mktemp("runs") / "tiny"
    experiment.run(config, workdir=str(place))
    return place


def test_a_run_is_loaded_at_any_step_that_is_kept(run):
    last, first = attention_jax.load(run), attention_jax.load(run, step=1)
    same = attention_jax.load(run, step=3)
    size = sum(x.size for x in jax.tree.leaves(last.params))
    assert repr(last) == f"Run of recall: multihead, {size:,} parameters"
    kernel = lambda run: run.params["blocks_0"]["attention"]["out"]["kernel"]
    np.testing.assert_array_equal(kernel(last), kernel(same))
    assert not np.array_equal(kernel(last), kernel(first))
    with pytest.raises(FileNotFoundError, match=r"step 7 .*: there are 1, 2, 3"):
        attention_jax.load(run, step=7)


def test_a_run_is_inspected_in_one_command(run, tmp_path, capsys):
    inspect.main(["inspect", str(run), f"--out={tmp_path / 'out'}", "--rows=5"])
    names = ["page.html", "heads.md", "maps.png", "pruning.png", "phase.png"]
    shown = capsys.readouterr().out.splitlines()  # Lines on what takes long come before.
    assert shown[-len(names) :] == [str(tmp_path / "out" / x) for x in names]
    assert all(size_of(tmp_path / "out" / x)[0] > 300 for x in names if x.endswith("png"))
    data = data_of(tmp_path / "out" / "page.html")
    assert data["steps"] == [1, 2, 3]
    assert {"induction_at_answers", "prefix_matching", "entropy"} <= set(data["statistics"][0][0])
    table = (tmp_path / "out" / "heads.md").read_text()
    assert f"attention-jax inspect {run} --out={tmp_path / 'out'} --rows=5" in table
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| blocks_0")]
    assert [row[1] for row in rows] == ["0", "1"]
    assert all(0 <= float(x.strip(" |")) for row in rows for x in row[2:])
    for name in ("maps.png", "pruning.png", "phase.png", "page.html"):
        assert f"({name})" in table


def test_a_row_whose_maps_do_not_fit_is_refused_before_the_work(run, tmp_path, monkeypatch):
    one = 2 * 16 * 16  # Of two heads.
    monkeypatch.setattr(findings, "MAX_WEIGHTS", one - 1)
    monkeypatch.setattr(findings, "_at", None)  # It would fail.
    with pytest.raises(ValueError, match=f"maps of {one:,} weights, and at most {one - 1:,} fit"):
        inspect.inspect(run, tmp_path / "out")
    monkeypatch.setattr(findings, "MAX_WEIGHTS", 3 * one)
    assert findings._rows_of_maps(subjects.of_run(run, 5)) == 3


def test_a_directory_that_cannot_be_written_is_refused_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "_at", None)  # It would fail.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(RunError, match=r"--out=.*new/out cannot be written"):
        inspect.main(["inspect", str(run), f"--out={tmp_path / 'new' / 'out'}"])
    assert not list(tmp_path.iterdir())


def test_a_warning_of_the_command_is_a_line(monkeypatch, capsys):
    monkeypatch.setattr(
        inspect, "inspect", lambda **_: warnings.warn("no font", stacklevel=1) or []
    )
    inspect.main(["inspect", "run"])
    assert capsys.readouterr().err == "inspect: no font\n"


def test_a_long_caption_stands_inside_the_picture(tmp_path):
    from matplotlib.image import imread

    words = " ".join(["a/long/path/of/a/run"] * 12)
    files = [tmp_path / f"{name}.png" for name in "abc"]
    analysis.draw_maps(files[0], {"blocks_0/attention": np.eye(3)[None]}, caption=words)
    analysis.draw_pruning(files[1], [2, 1], [0.9, 0.1], [[0.9, 0.2]], caption=words)
    analysis.draw_phase(files[2], [1, 2], {"a": [0, 1]}, {}, caption=words)
    for file in files:
        picture = imread(file)
        lowest = picture[-len(picture) // 5 :, :, :3]  # Where the caption stands.
        assert lowest.min() < 0.6
        assert (lowest[:, [0, 1, -2, -1]] == 1).all(), file.name


def test_work_that_takes_long_is_named(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "SILENCE", 0.0)
    inspect.main(["inspect", str(run), f"--out={tmp_path}", "--rows=2"])
    lines = capsys.readouterr().out.splitlines()
    for line in ("looking at the heads", "removing each head", "looking at checkpoint 2 of 3"):
        assert line in lines
    assert inspect.inspect(run, tmp_path, rows=2)  # From Python it is silent.
    assert capsys.readouterr().out == ""


@pytest.mark.filterwarnings("error")
def test_rows_of_one_token_are_inspected_without_scores(tmp_path):
    config = default_config("text")
    config.task.seq_length = 1
    config.model.update(features=8, num_layers=1, num_heads=2)
    config.train.update(epochs=1, steps_per_epoch=2, batch_size=4)
    config.optimizer.warmup_steps = config.eval.sample = 0
    experiment.run(config, workdir=str(tmp_path / "run"))
    inspect.inspect(tmp_path / "run", tmp_path / "out", rows=3)
    table = (tmp_path / "out" / "heads.md").read_text()
    assert "| importance |" in table
    assert "induction" not in table
    assert "TransformerLens" not in table


def test_a_model_of_hugging_face_is_inspected(tmp_path):
    written = inspect.inspect(GPT2, tmp_path, tokens="3 1 4 1 5 9 2 6")
    names = ["page.html", "heads.md", "maps.png", "pruning.png"]
    assert [path.name for path in written] == names
    data = data_of(tmp_path / "page.html")
    assert data["tokens"] == [["3", "1", "4", "1", "5", "9", "2", "6"]]
    assert [layer["heads"] for layer in data["layers"]] == [4, 4]
    assert "a text of 8 tokens" in (tmp_path / "heads.md").read_text()


def test_a_text_becomes_tokens_by_the_tokenizer_of_the_directory(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from attention_jax.laboratory.subject import of_directory

    words = {"the": 1, "cat": 4, "sat": 7}
    coder = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="the"))
    coder.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    coder.add_special_tokens(["<s>"])
    shutil.copytree(GPT2, tmp_path / "cats")
    coder.save(str(tmp_path / "cats" / "tokenizer.json"))
    subject = of_directory(tmp_path / "cats", text=b"<s> the cat sat the cat")
    assert subject.inputs.tolist() == [[3, 1, 4, 7, 1, 4]]
    assert subject.words == [["<s>", "the", "cat", "sat", "the", "cat"]]


def test_a_tokenizer_neither_pads_nor_cuts_and_shows_where_words_begin(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from attention_jax.laboratory.subject import of_directory

    words = {"▁the": 1, "▁cat": 4, "▁sat": 7, "<pad>": 0}
    coder = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    coder.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    coder.decoder = tokenizers.decoders.Metaspace()
    coder.enable_padding(length=12, pad_id=0, pad_token="<pad>")
    coder.enable_truncation(2)
    shutil.copytree(GPT2, tmp_path / "cats")
    coder.save(str(tmp_path / "cats" / "tokenizer.json"))
    subject = of_directory(tmp_path / "cats", text=b"the cat sat")
    assert subject.inputs.tolist() == [[1, 4, 7]]
    assert subject.words == [["␣the", "␣cat", "␣sat"]]


def test_a_checkpoint_that_is_broken_is_no_step(run, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(run, place)
    for file in (place / "checkpoints" / "3").rglob("*"):
        if file.is_file():
            file.write_bytes(b"broken")
    inspect.inspect(place, tmp_path / "out", rows=2)
    assert data_of(tmp_path / "out" / "page.html")["steps"] == [1, 2]
    assert "step 2" in (tmp_path / "out" / "heads.md").read_text().splitlines()[0]


@pytest.mark.parametrize(("most", "steps"), [(1.5, [None]), (0.5, None)])
def test_a_page_has_as_many_weights_as_it_holds(run, tmp_path, monkeypatch, most, steps):
    size = sum(x.size for x in analysis.attention_maps(*row_of(run)).values())
    monkeypatch.setattr("attention_jax.analysis.page.MAX_WEIGHTS", int(most * size))
    written = {path.name for path in inspect.inspect(run, tmp_path, rows=2)}
    assert {"heads.md", "maps.png", "pruning.png", "phase.png"} <= written
    assert ("page.html" in written) == (steps is not None)
    if steps is None:
        assert (
            f"There is no page: a row has {size:,} weights" in (tmp_path / "heads.md").read_text()
        )
    else:
        assert data_of(tmp_path / "page.html")["steps"] == steps


def row_of(run):
    subject = subjects.of_run(run, 1)
    return subject.model, subject.params, subject.inputs


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "the following arguments are required: RUN"),
        (["nowhere"], "nowhere holds no run with a checkpoint, and no model of Hugging Face."),
        ([str(GPT2)], "gpt2 is of Hugging Face, which needs --tokens or --text."),
        ([str(GPT2), "--tokens=3 x"], "--tokens must be numbers, as '3 1 4': got '3 x'."),
        ([str(GPT2), "--tokens=3 19"], "--tokens must be tokens below 19"),
        ([str(GPT2), "--tokens=3"], "--tokens must have two tokens or more, got 1."),
        (["RUN", "--text=FILE:no.txt"], "--text: no.txt cannot be read: No such file"),
        ([str(GPT2), f"--tokens={'1 ' * 33}"], "the model takes 32 tokens at most, got 33."),
        ([str(GPT2), "--text=The"], "tokenizer.json does not exist."),
        ([str(GPT2), "--tokens=1 2", "--rows=3"], "--rows is for a run of this package."),
        ([str(GPT2), "--tokens=1 2", "--checkpoints=3"], "--checkpoints is for a run"),
        (["RUN", "--rows=0"], "--rows must be at least 1: got 0."),
        (["RUN", "--checkpoints=0"], "--checkpoints must be at least 1: got 0."),
        (["RUN", "--text=The"], "--text is for a run of text: this one is of "),
        (["RUN", "--tokens=1 2"], "--tokens is for a directory of Hugging Face."),
        (["RUN", "--text=The", "--rows=2"], "--rows is for the rows of the task, which --text"),
        (["RUN", f"--out={__file__}"], "--out must be a directory: "),
        (["RUN", "--depth=3"], "--depth is unknown."),
    ],
)
def test_what_cannot_be_inspected_is_a_line(run, arguments, line):
    arguments = [str(run) if word == "RUN" else word for word in arguments]
    with pytest.raises(ConfigError) as error:
        inspect.main(["inspect", *arguments])
    assert line in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# What is left as heads go ------------------------------------------------------------------------


def test_a_curve_is_the_loop_over_closed_gates(run):
    found = attention_jax.load(run)
    inputs = found.task.sample(jax.random.key(0), np.arange(3)).inputs
    loss = lambda logits: logits.mean((1, 2))
    (path,) = analysis.heads_of(found.model, found.params, inputs)
    gated = jax.jit(
        lambda gates: loss(
            analysis.apply_with_gates(found.model, found.params, inputs, {path: gates})
        ).mean()
    )
    orders = [[(path, 1), (path, 0)], [(path, 0), (path, 1)]]
    curve = analysis.removal_curve(found.model, found.params, inputs, loss, orders)
    for order, losses in zip(orders, curve, strict=True):
        gates = np.ones(2)
        for (_, head), value in zip([(path, None), *order], losses, strict=True):
            if head is not None:
                gates[head] = 0
            assert value == pytest.approx(float(gated(gates)), abs=1e-6)
    with pytest.raises(ValueError, match=r"counts must be from 0 to 2, got \[3\]"):
        analysis.removal_curve(found.model, found.params, inputs, loss, orders, counts=[3])


def test_heads_of_induction_are_removed_together_and_so_is_half_of_the_others(run, monkeypatch):
    subject = subjects.of_run(run, 5)
    arguments = subject.model, subject.params, subject.inputs
    (path,) = analysis.heads_of(*arguments)
    scored = lambda *args: {"induction_at_answers": {path: np.array([0.1, 0.9])}}
    monkeypatch.setattr(findings, "_scores", scored)
    found = findings.find(subject, points=2, orders=1, checkpoints=1)
    gated = jax.jit(lambda gates: analysis.apply_with_gates(*arguments, {path: gates}))
    left = [
        float(subject.accuracy(gated(np.array(gates))).mean()) for gates in ([1.0, 0], [0, 1.0])
    ]
    assert list(found.groups.values()) == pytest.approx(left, abs=1e-6)
    told = "\n".join(found.told(subject))
    assert "without the 1 head whose induction at answers is at least 0.5" in told
    assert "without 1 of the 1 others, the least important" in told
