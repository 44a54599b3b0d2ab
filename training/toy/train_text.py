"""Train the tokenizer and the text encoder of the embedded pipeline: python training/toy/train_text.py --output DIR

A language model would be out of proportion to the toy world, and an untrained text encoder hardly tells which word
stands where: "a red circle above a blue square" and "a blue square above a red circle" are nearly the same to it. So a
UMT5 of two layers learns to tell a reading head, which is then thrown away, what captions say: how many things there
are, the color, shape, size and motion of the upper or left one and of the other one, and the background. It does not
learn from captions of held-out combinations.
"""

import argparse
import itertools
import json
import math
import random
import sys
from collections import Counter

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from longlive_diffusers.atomic_write import new_folder
from longlive_diffusers.conversion.output_folder import prepare_output
from longlive_diffusers.user_path import user_path
from one_line import run
from schedules import one_cycle
from world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, Scene, caption, draw_scene


SEED = 0
TEXT_DIM = 64
MAX_LENGTH = 32  # tokens; the longest caption of the toy world has 27, scene-cut prefix and end mark included


def phrases(text: str) -> list[str]:
    return text.replace("\n", "|").split("|")


WORDS_OF_COLORS = phrases(
    "red|green|blue|yellow|orange|purple|pink|cyan|white|black|grey|brown|golden|silver|turquoise"
)
WORDS_OF_SIZES = phrases("small|large|tiny|huge|wide|tall|thin|round|bright|dark|striped|dotted")
WORDS_OF_SHAPES = phrases(
    "circle|square|triangle|star|ring|cross|diamond|heart|ball|cube|line|dot|hexagon|wave|spiral|arrow"
)
WORDS_OF_MOTIONS = phrases("""moves left|moves right|moves up|moves down|bounces|bounces off the walls|spins slowly
spins quickly|falls|rises|grows|shrinks|stands still|swings from side to side|rolls across the ground
orbits the centre|fades in|fades out|zigzags|jumps twice|turns clockwise|drifts diagonally|accelerates
slows down and stops|pulses|leaves the frame|enters from the left|follows another shape|splits in two
changes its colour""")
WORDS_OF_BACKGROUNDS = phrases("""on a black background|on a white background|on a grey background|over a gradient
over a checkerboard|in front of stripes|in the fog|under a blue sky|at night|at sunset|at sunrise|in the rain
in the snow|on the water|in a forest|in a city street|on a beach|in the desert|between mountains|in a meadow
in space among the stars|above the clouds|in an empty room""")
SCENERY = phrases("""The scene transitions. |The camera pans slowly to the right.|The camera follows the subject.
A close-up shot.|A wide shot of the landscape.|Then the light changes.|It is raining.|Fire and smoke.
The sun is setting behind the mountains.|A fox runs through the forest.|A cat walks on the grass.
A dog sleeps on the beach.|A boat sails across the sea.|A lighthouse in a storm, waves breaking on the rocks.
A car drives through a city at night.|A bird flies over the lake.|A woman walks along a snowy street.
A man rides a bicycle down the hill.|Children play in the garden.|Red leaves fall from the trees.
A flower opens in the morning light.|A train passes a bridge.|Fish swim in clear water.
low quality, blurry, static, distorted|high quality, detailed, realistic, cinematic|first, second, third, last
zero one two three four five six seven eight nine ten|0 1 2 3 4 5 6 7 8 9""")


def captions() -> list[str]:
    """Return a few thousand sentences: those of the toy world, and others in which every word above appears, so that
    what people type who do not know the toy world is still read as words."""
    rng = random.Random(SEED)
    sentences = []
    for color, shape, motion in itertools.product(WORDS_OF_COLORS, WORDS_OF_SHAPES, WORDS_OF_MOTIONS):
        place, size = rng.choice(WORDS_OF_BACKGROUNDS), rng.choice(WORDS_OF_SIZES)
        subject = rng.choice([f"a {color} {shape}", f"a {size} {color} {shape}", f"the {color} {shape}"])
        sentences.append(f"{subject} {motion}{rng.choice(['', ' ' + place])}{rng.choice(['', '.'])}")
    sentences += [caption(draw_scene(rng, num_things=rng.choice((1, 2))), rng) for _ in range(4000)]
    return sentences + SCENERY * 50


def build_tokenizer(sentences: list[str], max_length: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of unigram pieces like T5's: padding is 0, `</s>` is appended, unknown characters fall back to
    their bytes."""
    special = ["<pad>", "</s>", "<unk>"]
    normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    words = pre_tokenizers.Metaspace()
    trained = Tokenizer(models.Unigram())
    trained.normalizer, trained.pre_tokenizer = normalizer, words
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-▁"
    trainer = trainers.UnigramTrainer(
        vocab_size=600,
        special_tokens=special,
        unk_token="<unk>",
        initial_alphabet=list(letters),
        show_progress=False,
    )
    trained.train_from_iterator(sentences, trainer)
    # The trainer looks for what words have in common, so it splits up all of these few words. They should be whole, as
    # common words are in T5's tokenizer.
    counts = Counter(word for text in sentences for word, _ in words.pre_tokenize_str(normalizer.normalize_str(text)))
    pieces = {piece: score for piece, score in json.loads(trained.to_str())["model"]["vocab"] if piece not in special}
    pieces |= {word: math.log(count / counts.total()) for word, count in counts.items()}
    # Trained scores are sums over many threads; rounded, they do not depend on how the threads shared the work.
    pieces = sorted(
        ((piece, round(score, 3)) for piece, score in pieces.items()), key=lambda pair: (-pair[1], pair[0])
    )
    lowest = pieces[-1][1] - 10
    vocabulary = [(piece, 0.0) for piece in special] + pieces + [(f"<0x{byte:02X}>", lowest) for byte in range(256)]

    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, words
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=max_length
    )


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=vocab_size, d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    return UMT5EncoderModel(config)


# ------------------------------------------------------------------------------------------------- what it learns from
UNSAID = -100  # cross_entropy's label for what is not to be learned
THING_ATTRIBUTES = {"color": tuple(COLORS), "shape": SHAPES, "size": tuple(SIZES), "motion": tuple(MOTIONS)}


def questions() -> dict[str, int]:
    """Return what can be read in a caption, by name, and the number of possible answers to each."""
    things = {f"{name} {i}": len(values) for i in range(2) for name, values in THING_ATTRIBUTES.items()}
    return {"arrangement": 3, "background": len(BACKGROUNDS), **things}


def answers(scene: Scene, text: str) -> list[int]:
    """Return the answers in the order of `questions`, with `UNSAID` for what the caption leaves out."""
    arrangement = (None, "stacked", "beside").index(scene.arrangement)
    ground = list(BACKGROUNDS).index(scene.background) if scene.background in text.split() else UNSAID
    labels = [arrangement, ground]
    for i in range(2):
        for name, values in THING_ATTRIBUTES.items():
            value = vars(scene.things[i])[name] if i < len(scene.things) else None
            # If a caption gives one size for two things, one would have to parse it to tell which of them is meant.
            said = value is not None and (
                name != "size" or text.count("small") + text.count("large") == len(scene.things)
            )
            labels.append(values.index(value) if said else UNSAID)
    return labels


class Reader(nn.Module):
    """Asks every question of a text's embeddings at once: attention with one query each, then a linear layer."""

    def __init__(self, dim: int):
        super().__init__()
        counts = questions()
        self.queries = nn.Parameter(torch.randn(len(counts), dim))
        self.answers = nn.ModuleList(nn.Linear(dim, count) for count in counts.values())

    def forward(self, embeds: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Map embeddings `[B, L, D]` and their mask `[B, L]` to the logits `[B, answers]` of each question."""
        scores = torch.einsum("qd,bld->bql", self.queries, embeds) * embeds.shape[-1] ** -0.5
        weights = scores.masked_fill(mask[:, None] == 0, -torch.inf).softmax(dim=-1)
        read = weights @ embeds
        return [layer(read[:, i]) for i, layer in enumerate(self.answers)]


def draw_texts(seed: str, count: int, held_out: bool = False) -> tuple[list[str], torch.Tensor]:
    """Draw captions, some with the scene-cut prefix, and return them with their labels `[count, questions]`."""
    rng = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        scene = draw_scene(rng, num_things=rng.choice((1, 2)), held_out=held_out)
        text = caption(scene, rng)
        labels.append(answers(scene, text))
        texts.append(f"The scene transitions. {text}" if rng.random() < 0.2 else text)
    return texts, torch.tensor(labels)


def train_text_encoder(tokenizer: PreTrainedTokenizerFast, steps: int, batch_size: int = 64) -> UMT5EncoderModel:
    """Train the encoder, and print how often its reader is right about captions of held-out combinations."""
    torch.manual_seed(SEED + 1)
    encoder = build_text_encoder(len(tokenizer))
    reader = Reader(TEXT_DIM)
    parameters = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.99), weight_decay=1e-2)
    schedule = one_cycle(optimizer, 3e-3, steps=steps, warmup=0.1)

    def read(texts: list[str]) -> list[torch.Tensor]:
        tokens = tokenizer(texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt")
        embeds = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return reader(embeds, tokens.attention_mask)

    bar = tqdm(range(steps), desc="text encoder", unit="step")
    for step in bar:
        texts, labels = draw_texts(f"{SEED} {step}", batch_size)
        losses = [
            F.cross_entropy(logits, labels[:, i], ignore_index=UNSAID, reduction="sum") / batch_size
            for i, logits in enumerate(read(texts))
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{sum(losses).item():.3f}")

    encoder.eval()
    texts, labels = draw_texts(f"{SEED} test", 500, held_out=True)
    with torch.no_grad():
        for i, (name, logits) in enumerate(zip(questions(), read(texts), strict=True)):
            said = labels[:, i] != UNSAID
            right = (logits.argmax(dim=-1) == labels[:, i])[said].float().mean().item()
            print(f"  {name}: {100 * right:.1f} % of {int(said.sum())} held-out captions")
    return encoder


def main() -> None:
    parser = argparse.ArgumentParser(description="Make tokenizer and text encoder of the embedded pipeline.")
    parser.add_argument(
        "--output",
        type=user_path,
        required=True,
        help="The folder to write tokenizer/ and text_encoder/ to; new or empty.",
    )
    parser.add_argument(
        "--steps", type=int, default=600, help="The number of updates of the text encoder (default: %(default)s)."
    )
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    prepare_output(arguments.output)
    tokenizer = build_tokenizer(captions(), MAX_LENGTH)
    encoder = train_text_encoder(tokenizer, arguments.steps)
    with new_folder(arguments.output) as folder:
        tokenizer.save_pretrained(folder / "tokenizer")
        encoder.save_pretrained(folder / "text_encoder")


if __name__ == "__main__":
    sys.exit(run(main))
