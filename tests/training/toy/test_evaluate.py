"""The evaluation's plumbing: an oracle that draws what captions say is right everywhere, one that errs is caught."""

import json
import random
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from evaluation import vae as evaluate_vae
from evaluation.diversity import diversity
from evaluation.scenarios import Story, cuts, image_starts, multi_shots, single_shots, switches
from evaluation.sections import Evaluation, Settings, events
from evaluation.store import Store, fingerprint
from evaluation.tables import COLUMNS, Table
from evaluation.videos import Sampling, judge_stories, make_videos
from judge import read_chunk
from longlive_diffusers import LongLivePipeline, StreamingDecoder
from longlive_diffusers.models.streaming_vae import normalize_latents
from tests.support.tiny_pipeline import TEXT_DIM, tiny_pipeline, tiny_transformer
from train_decoder import build_decoder
from train_vae import build_vae
from world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIDE, SIZES, Scene, Thing, render


SMALL = Settings(
    num_prompts=3, num_inference_steps=2, step_counts=(1, 2), long_steps=1, num_chunks=4, long_factor=2, batch_size=2
)


# -------------------------------------------------- a pipeline that knows the toy world
def one_of(names, text: str, otherwise):
    return next((name for name in names if re.search(rf"\b{name}\b", text)), otherwise)


def imagine(text: str, rng: random.Random, before: Scene | None) -> Scene:
    """A scene of this caption; what it does not say, and the places, are `before`'s or anything."""
    background = one_of(BACKGROUNDS, text, before.background if before else rng.choice(list(BACKGROUNDS)))
    text = re.sub(r"over|on a|background|,", "", text)
    parts, arrangement = [text], None
    relations = {"above": "stacked", "below it": "stacked", "to the left of": "beside", "to its right": "beside"}
    for relation, name in relations.items():
        if relation in text:
            parts, arrangement = text.split(relation), name
    things = []
    for number, part in enumerate(parts):
        old = before.things[number] if before else None
        x, y = (old.x, old.y) if old else (rng.uniform(0, SIDE), rng.uniform(0, SIDE))
        if old is None and arrangement is not None:
            x, y = (x, 16 + 32 * number) if arrangement == "stacked" else (16 + 32 * number, y)
        size = one_of(SIZES, part, old.size if old else rng.choice(list(SIZES)))
        verb = re.search(rf"(moves|moving|slides|drifts|stays|stands|move) ({'|'.join(MOTIONS)})", part)
        motion = verb.group(2) if verb else "still"
        things.append(Thing(one_of(COLORS, part, None), one_of(SHAPES, part, None), size, motion, x, y))
    return Scene(background, tuple(things), arrangement)


def scene_of_image(image: np.ndarray, text: str) -> Scene:
    reading = read_chunk(np.stack([image, image]))
    arrangement = imagine(text, random.Random(0), None).arrangement
    things = [Thing(thing.color, thing.shape, thing.size, "still", thing.x, thing.y) for thing in reading.things]
    things.sort(key=lambda thing: thing.y if arrangement == "stacked" else thing.x)
    return Scene(reading.background, tuple(things), arrangement)


class OracleSession:
    def __init__(self, oracle: "Oracle", shots, durations, images, seeds):
        self.oracle, self.shots, self.durations = oracle, shots, durations
        self.rngs = [random.Random(seed) for seed in seeds]
        self.scenes: list[Scene | None] = [None] * len(shots)
        self.images, self.index, self.pending = images, 0, None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def _set_prompt(self, texts: list[str]) -> None:
        self.pending = (texts, False)

    prompt = property(None, _set_prompt)

    def cut(self, texts: list[str]) -> None:
        self.pending = (texts, True)

    def __next__(self):
        begins = [sum(self.durations[:shot]) for shot in range(len(self.durations))]
        length = 5 if self.index == 0 else 8
        for row, rng in enumerate(self.rngs):
            if self.index in begins and self.pending is None:
                text = self.shots[row][begins.index(self.index)]
                before = scene_of_image(self.images[row], text) if self.images and self.index == 0 else None
                self.scenes[row] = imagine(text, rng, before)
            elif self.pending is not None and not self.oracle.is_deaf:
                texts, cut = self.pending
                self.scenes[row] = imagine(texts[row], rng, None if cut else self.scenes[row])
        frames = np.stack([render(scene, length) for scene in self.scenes]).astype(np.float32) / 255
        self.scenes = [scene.after(length) for scene in self.scenes]
        self.index, self.pending = self.index + 1, None
        return SimpleNamespace(frames=frames)


class Oracle:
    """Stands in for a pipeline; `is_deaf`: prompts and cuts that come on the way are ignored."""

    def __init__(self, is_deaf: bool = False):
        self.is_deaf, self.calls = is_deaf, []
        config = SimpleNamespace(chunk_size=2, sample_height=8, sample_width=8)
        self.transformer, self.vae_scale_factor_spatial = SimpleNamespace(config=config), 8
        self.vae = SimpleNamespace(device="cpu", dtype=torch.float32)

    def stream(self, *, prompt=None, shot_prompts=None, chunks_per_shot=None, image=None, generator, **options):
        self.calls.append(options)
        shots = shot_prompts or [[text] for text in prompt]
        durations = chunks_per_shot[0] if chunks_per_shot else [1000]
        return OracleSession(self, shots, durations, image, [item.initial_seed() for item in generator])


class PerfectVAE:
    """Stands in for both the streaming encoder and decoder."""

    def __init__(self, vae):
        self.encode = self.decode = lambda pixels: pixels


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An oracle, the folder of its evaluation, and its tables."""
    folder, oracle = tmp_path_factory.mktemp("oracle"), Oracle()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_vae, "StreamingEncoder", PerfectVAE)
        patch.setattr(evaluate_vae, "StreamingDecoder", PerfectVAE)
        patch.setattr("evaluation.diversity.NUM_PROMPTS", 2)
        tables = evaluate.evaluate(oracle, folder, SMALL, list(evaluate.SECTIONS), model="oracle")
    return oracle, folder, tables


def test_the_oracle_is_right_in_everything(evaluated):
    _, _, tables = evaluated
    for name in ("accuracy", "steps", "time", "events"):
        for table in tables[name]:
            first = table.columns.index("all")
            for row in table.rows:
                # Not everything is always asked for: a cut has no steady first chunk, few captions may say no size.
                assert row[first] == 100 and set(row[first:]) <= {100, None}, (table.title, row)
    quality, judged = tables["vae"]
    assert [row[:2] for row in quality.rows] == [["29 frames", 3], ["61 frames", 2]]
    assert all(cell > 50 for row in quality.rows for cell in row[2:])
    assert all(row[2] == 100 for row in judged.rows) and len(judged.rows) == 4


def test_tables_have_the_rows_they_should(evaluated):
    tables = evaluated[2]
    assert [row[0] for row in tables["accuracy"][0].rows] == [
        f"{group}, {things}" for group in ("seen", "held out") for things in ("one thing", "two things")
    ]
    assert [row[0] for row in tables["steps"][0].rows] == ["1", "2"]
    assert len(tables["time"][0].rows) == 12
    assert [row[0] for row in tables["events"][1].rows] == [
        *(f"multi-shot: shot {number}" for number in (1, 2, 3)),
        *(f"{kind}: {part}" for kind in ("prompt switch", "cut") for part in ("before", "after")),
        "image to video: whole video",
    ]


def test_files_of_an_evaluation(evaluated):
    _, folder, tables = evaluated
    report = (folder / "report.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert set(results["sections"]) == set(evaluate.SECTIONS)
    assert results["sections"]["accuracy"][0]["rows"] == tables["accuracy"][0].rows
    for name in ("steps.png", "time.png", "strip.png"):
        assert f"({name})" in report
        with Image.open(folder / name) as image:
            assert image.width > 500
    assert len(list((folder / "videos").glob("*.mp4"))) == 8
    assert not list(folder.rglob("*.partial*"))


def test_videos_are_made_as_sampling_says(evaluated):
    calls = evaluated[0].calls
    for options in calls:
        is_without_sinks = options.get("sink_size") == 0 and options.get("multi_shot_sink") is False
        assert is_without_sinks or not {"sink_size", "multi_shot_sink"} & set(options)
    long = [options for options in calls if options["num_frames"] == 61]
    ways = {("sink_size" in options, options["relative_rope"]) for options in long}
    assert ways == {(False, False), (False, True), (True, False), (True, True)}


def test_finished_parts_are_kept(evaluated, tmp_path):
    _, folder, tables = evaluated
    again = evaluate.evaluate(None, folder, SMALL, ["accuracy"], model="oracle")
    assert again["accuracy"] == tables["accuracy"]
    # Batches do not matter, all else does.
    evaluate.evaluate(None, folder, replace(SMALL, batch_size=7), ["accuracy"], model="oracle")
    for settings, model, message in (
        (replace(SMALL, seed=1), "oracle", "seed was 0, now 1"),
        (replace(SMALL, num_inference_steps=5), "oracle", "num_inference_steps was 2, now 5"),
        (SMALL, "another", "'another'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.evaluate(None, folder, settings, ["accuracy"], model=model)


def test_an_interrupted_part_leaves_nothing_behind(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    store = Store(tmp_path, "model")
    with pytest.raises(KeyboardInterrupt):
        store.get("a/b", {"seed": 0}, interrupted)
    assert not list((tmp_path / "parts").iterdir())
    assert store.get("a/b", {"seed": 0}, lambda: [1, 2]) == [1, 2]
    assert store.get("a/b", {"seed": 0}, interrupted) == [1, 2]


def test_a_deaf_model_is_found_out(tmp_path):
    evaluation = Evaluation(Oracle(is_deaf=True), SMALL, Store(tmp_path, "deaf"))
    rows = {row[0]: row for row in events(evaluation)[1].rows}
    every = 2 + COLUMNS.index("all")
    for kind in ("prompt switch", "cut"):
        assert rows[f"{kind}: before"][every] == 100 and rows[f"{kind}: after"][every] == 0
    assert rows["multi-shot: shot 3"][every] == 100


def test_a_video_that_jumps_is_not_steady():
    class Jumpy(Oracle):
        def stream(self, **options):
            session = super().stream(**options)
            session.__class__ = JumpySession
            return session

    class JumpySession(OracleSession):
        def __next__(self):
            chunk = super().__next__()
            self.scenes = [scene.after(20) for scene in self.scenes]
            return chunk

    stories = single_shots("jump", 8, 3, num_things=1, held_out=False)
    moving = [story for story in stories if story.segments[0].scene.things[0].motion != "still"]
    for video in judge_stories(Jumpy(), moving, Sampling(1), description="jumps"):
        assert [chunk.marks.get("steady") for chunk in video] == [None, False, False]
        assert all(chunk.marks["motion"] for chunk in video)


# -------------------------------------------------- stories
def test_stories_depend_on_the_seed_alone():
    many, few = (single_shots("x", count, 4, num_things=None, held_out=True) for count in (6, 3))
    assert many[:3] == few and many[0] != many[2]
    assert single_shots("y", 3, 4, num_things=None, held_out=True) != few


def test_outlines():
    assert {story.outline for story in switches("x", 5, 9, 2)} == {(((4, "planned"), (5, "switch")), True)}
    assert {story.outline for story in cuts("x", 5, 3)} == {(((3, "planned"), (3, "cut")), True)}
    assert {story.outline for story in multi_shots("x", 5, 2)} == {(((2, "planned"),) * 3, True)}
    assert list(cuts("x", 1, 2)[0].chunks()) == [(0, True), (0, False), (1, True), (1, False)]
    assert all(story.image == story.segments[0].scene for story in image_starts("x", 2, 4))


def test_batches_of_different_stories_are_refused():
    mixed = [*cuts("x", 1, 3), *cuts("x", 1, 2)]
    with pytest.raises(ValueError, match="2 outlines of 2"):
        judge_stories(Oracle(), mixed, Sampling(1), description="mixed")
    backwards = Story(cuts("x", 1, 2)[0].segments[::-1])
    with pytest.raises(ValueError, match="cut, planned"):
        next(make_videos(Oracle(), [backwards], Sampling(1)))


# -------------------------------------------------- a real pipeline, untrained
@pytest.fixture(scope="module")
def pipe() -> LongLivePipeline:
    torch.manual_seed(0)
    transformer = tiny_transformer(
        in_channels=16, out_channels=16, text_dim=TEXT_DIM, sample_height=8, sample_width=8, num_layers=1
    )
    return tiny_pipeline(vae=build_vae(8).eval(), transformer=transformer)


def test_an_untrained_pipeline_is_evaluated(pipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("evaluation.diversity.NUM_SEEDS", 2)
    monkeypatch.setattr("evaluation.diversity.NUM_PROMPTS", 1)
    settings = replace(SMALL, num_prompts=1, step_counts=(1,), num_inference_steps=1, max_sequence_length=8)
    evaluate.check_pipeline(pipe)
    pipe = deepcopy(pipe)
    pipe.vae.decoder.conv_out.weight.data.mul_(0.01)  # in plain frames, the judge has no hundreds of things to read
    pipe.save_pretrained(tmp_path / "model")
    marked = fingerprint(tmp_path / "model")
    tables = evaluate.evaluate(pipe, tmp_path / "out", settings, list(evaluate.SECTIONS), model=marked)
    assert all(row[2] == 0 for row in tables["accuracy"][0].rows)
    assert "Accuracy over time" in capsys.readouterr().out
    assert evaluate.load(tmp_path / "model", "cpu", torch.bfloat16).transformer.dtype == torch.bfloat16
    (tmp_path / "model" / "transformer" / "config.json").write_text("{}")
    assert fingerprint(tmp_path / "model") != marked


def test_noise_does_not_depend_on_the_batch(pipe):
    stories = single_shots("x", 2, 1, num_things=1, held_out=False)
    sampling = Sampling(1, max_sequence_length=8)
    together = next(make_videos(pipe, stories, sampling))
    alone = next(make_videos(pipe, stories[1:], sampling, first_index=1))
    np.testing.assert_allclose(alone[0], together[1], atol=1e-4)


def test_a_tiny_decoder_makes_the_frames_in_place_of_the_vae(pipe):
    torch.manual_seed(0)
    decoder, sampling = build_decoder(), Sampling(1, max_sequence_length=8)
    stories = single_shots("x", 1, 1, num_things=1, held_out=False)
    by_vae, tiny = (next(make_videos(pipe, stories, sampling, decoder=made_by)) for made_by in (None, decoder))
    assert tiny.shape == by_vae.shape and np.abs(tiny - by_vae).mean() > 0.01

    latents = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipe.decode_latents(normalize_latents(pipe.vae, latents), "pt", decoder)
    decoded = evaluate_vae.decode_with(pipe.vae, decoder)(latents)
    torch.testing.assert_close(decoded.transpose(1, 2) / 2 + 0.5, expected)
    torch.testing.assert_close(
        evaluate_vae.decode_with(pipe.vae, None)(latents), StreamingDecoder(pipe.vae).decode(latents)
    )


def test_diversity_is_that_of_the_decoders_frames(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.diversity.NUM_SEEDS", 2)
    monkeypatch.setattr("evaluation.diversity.NUM_PROMPTS", 1)
    torch.manual_seed(0)
    settings, decoder, seen = replace(SMALL, max_sequence_length=8, num_inference_steps=1), build_decoder(), []
    stream = LongLivePipeline.stream
    monkeypatch.setattr(
        LongLivePipeline, "stream", lambda self, **options: seen.append(options) or stream(self, **options)
    )
    for number, made_by in enumerate((None, decoder)):
        diversity(Evaluation(pipe, settings, Store(tmp_path / str(number), "model"), made_by))
    assert [options.get("decoder") for options in seen] == [None, decoder]


@pytest.mark.parametrize("name", ["dtype", "seed", "max_sequence_length"])
def test_a_part_of_other_settings_is_not_taken_for_diversity(evaluated, tmp_path, name):
    oracle, folder, _ = evaluated
    shutil.copytree(folder / "parts", tmp_path / "parts")
    value = "bfloat16" if name == "dtype" else 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.diversity.NUM_PROMPTS", 2)
        with pytest.raises(ValueError, match=f"{name} was .*, now {value!r}"):
            evaluate.evaluate(oracle, tmp_path, replace(SMALL, **{name: value}), ["diversity"], model="oracle")


@pytest.mark.parametrize("section", sorted(evaluate.SECTIONS))
def test_no_part_is_taken_that_was_made_in_another_dtype(evaluated, tmp_path, section):
    oracle, folder, _ = evaluated
    shutil.copytree(folder / "parts", tmp_path / "parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.diversity.NUM_PROMPTS", 2)
        with pytest.raises(ValueError, match="dtype was 'float32', now 'bfloat16'"):
            evaluate.evaluate(oracle, tmp_path, replace(SMALL, dtype="bfloat16"), [section], model="oracle")


# -------------------------------------------------- bad input, and tables
def test_bad_settings():
    for changes, message in (({"num_prompts": 0}, "num_prompts 0"), ({"num_chunks": 3}, "got 3")):
        with pytest.raises(ValueError, match=message):
            replace(SMALL, **changes)
    with pytest.raises(ValueError, match="-1"):
        replace(SMALL, guidance_scale=-1.0)
    with pytest.raises(ValueError, match=r"\[\]"):
        replace(SMALL, step_counts=())


def test_bad_command_lines(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text("{}")
    good = ["--model", str(tmp_path), "--output", "out"]
    parsed = evaluate.parse_arguments(
        [*good, "--quick", "--seed", "3", "--step_counts", "2", "4", "--dtype", "bfloat16"]
    )
    assert parsed.settings == replace(evaluate.QUICK, seed=3, step_counts=(2, 4), dtype="bfloat16")
    for more, message in (
        (["--num_prompts", "0"], "num_prompts 0"),
        (["--only", "weather"], "weather"),
        (["--device", "toaster"], "toaster"),
        (["--model", str(tmp_path / "nothing")], "no pipeline"),
        (["--decoder", str(tmp_path)], "holds no decoder"),
    ):
        with pytest.raises(SystemExit):
            evaluate.parse_arguments([*good, *more])
        assert message in capsys.readouterr().err


def test_bad_pipelines_and_sections(tmp_path):
    with pytest.raises(ValueError, match=r"model_index\.json"):
        evaluate.load(tmp_path, "cpu")
    oracle = Oracle()
    oracle.vae_scale_factor_spatial = 16
    with pytest.raises(ValueError, match="128x128"):
        evaluate.check_pipeline(oracle)
    with pytest.raises(ValueError, match="no section weather"):
        evaluate.evaluate(oracle, tmp_path, SMALL, ["weather"], model="oracle")


def test_tables_as_text_and_markdown():
    table = Table("Title", ("name", "n", "all"), [["short", 3, 12.345], ["longer", 10, None]], "Note.")
    assert table.as_text().splitlines() == [
        "Title",
        "Note.",
        "name     n   all",
        "short    3  12.3",
        "longer  10     -",
    ]
    assert "| short | 3 | 12.3 |" in table.as_markdown() and "| --- | ---: | ---: |" in table.as_markdown()
