"""The clean pass of a chunk comes after its latents were handed over: once, and before the next chunk. The last chunk
has none."""

import threading

import pytest
import torch

from longlive_diffusers import LongLivePipeline
from longlive_diffusers.models.streaming_vae import StreamingDecoder
from longlive_diffusers.models.transformer_longlive import LongLiveTransformer3DModel
from tests.support.tiny_pipeline import tiny_arguments, tiny_pipeline


WAIT = 10  # seconds after which something that should happen is said not to
every_mode = pytest.mark.parametrize("asynchronous", [False, True])


@pytest.fixture
def pipe() -> LongLivePipeline:
    return tiny_pipeline()


class Watch:
    """Notes what happens: "step", "clean" and "decode"; `before` may do something then."""

    def __init__(self, monkeypatch):
        self.happened: list[str] = []
        self.before = {"step": lambda: None, "clean": lambda: None, "decode": lambda: None}
        forward, decode = LongLiveTransformer3DModel.forward, StreamingDecoder.decode

        def noted_forward(model, latents, timestep, *args, **options):
            self.note("step" if timestep.any() else "clean")
            return forward(model, latents, timestep, *args, **options)

        def noted_decode(decoder, latents):
            self.note("decode")
            return decode(decoder, latents)

        monkeypatch.setattr(LongLiveTransformer3DModel, "forward", noted_forward)
        monkeypatch.setattr(StreamingDecoder, "decode", noted_decode)

    def note(self, what: str) -> None:
        self.before[what]()
        self.happened.append(what)


@pytest.fixture
def watch(monkeypatch) -> Watch:
    return Watch(monkeypatch)


def test_a_chunk_is_decoded_before_its_clean_pass_which_has_run_when_the_caller_has_it(pipe, watch):
    chunk = ["step", "step", "decode", "clean"]
    with pipe.stream(**tiny_arguments(num_frames=None, output_type="np")) as session:
        for count in range(1, 4):
            next(session)
            assert watch.happened == chunk * count


def test_asynchronous_decoding_begins_before_the_clean_pass(pipe, watch):
    """The clean pass of every chunk but the last waits here until the chunk is being decoded."""
    decoding = threading.Semaphore(0)
    outcomes = []
    watch.before["decode"] = decoding.release
    watch.before["clean"] = lambda: outcomes.append(decoding.acquire(timeout=WAIT))
    arguments = tiny_arguments(num_frames=29, output_type="np")
    with pipe.stream(**arguments, async_decode=True) as session:
        assert len(list(session)) == 4
    assert outcomes == [True] * 3


CASES = {
    "frames": ({"output_type": "np"}, 3),
    "bytes": ({"output_type": "uint8"}, 3),
    "latents": ({"output_type": "latent"}, 3),
    "guidance": ({"guidance_scale": 3.0}, 6),
    "a continued video": ({"video_latents": torch.randn(1, 8, 4, 4, 4)}, 3),
    "an image": ({"image_latents": torch.randn(1, 8, 1, 4, 4)}, 3),
    "a cut": ({"shot_prompts": ["a cat", "a dog"], "prompt": None}, 3),
}


@pytest.mark.parametrize(("overrides", "passes"), CASES.values(), ids=CASES)
@every_mode
def test_every_chunk_but_the_last_has_one_clean_pass_in_each_cache(pipe, watch, overrides, passes, asynchronous):
    with pipe.stream(**tiny_arguments(num_frames=29, **overrides), async_decode=asynchronous) as session:
        assert len(list(session)) == 4
    assert watch.happened.count("clean") == passes


def test_whoever_only_iterates_over_the_denoiser_gets_the_same_chunks(pipe):
    """A chunk that nobody has finished is finished when the next one begins."""
    expected = pipe(**tiny_arguments(num_frames=37)).frames
    with pipe.stream(**tiny_arguments(num_frames=37)) as session:
        found = torch.cat([chunk.latents for chunk in session._denoiser.chunks()], dim=2)
    assert torch.equal(found, expected)


def test_finishing_twice_is_finishing_once(pipe, watch):
    with pipe.stream(**tiny_arguments(num_frames=None)) as session:
        session._denoiser.finish_chunk()  # there is no chunk yet
        next(session)
        session._denoiser.finish_chunk()
    assert watch.happened == ["step", "step", "clean"]


def test_models_that_take_turns_on_the_device_are_fetched_once_a_chunk(pipe, watch, monkeypatch):
    """With offloading, decoding in between would bring the network in twice."""
    monkeypatch.setattr(LongLivePipeline, "is_offloaded", property(lambda _: True))
    with pipe.stream(**tiny_arguments(output_type="np")) as session:
        list(session)
    assert watch.happened == ["step", "step", "clean", "decode", "step", "step", "decode"]


def fail_at(watch: Watch, what: str, count: int) -> None:
    def fail() -> None:
        if watch.happened.count(what) == count:
            raise ArithmeticError(f"{what} {count} failed")

    watch.before[what] = fail


@pytest.mark.parametrize("count", [0, 1])
def test_a_clean_pass_that_fails_ends_the_stream(pipe, watch, count):
    fail_at(watch, "clean", count)
    session = pipe.stream(**tiny_arguments(num_frames=None, output_type="np"))
    for _ in range(count):
        next(session)
    with pytest.raises(ArithmeticError, match=f"clean {count} failed"):
        next(session)
    assert list(session) == [] and session.kv_cache_bytes == 0


@pytest.mark.parametrize("count", [0, 1])
def test_a_clean_pass_that_fails_after_the_hand_over_fails_the_next_chunk(pipe, watch, count):
    fail_at(watch, "clean", count)
    session = pipe.stream(**tiny_arguments(num_frames=None, output_type="np"), async_decode=True)
    assert [next(session).index for _ in range(count + 1)] == list(range(count + 1))
    with pytest.raises(ArithmeticError, match=f"clean {count} failed"):
        next(session)
    assert list(session) == [] and session.kv_cache_bytes == 0


@every_mode
def test_a_decoder_that_fails_ends_the_stream(pipe, watch, asynchronous):
    fail_at(watch, "decode", 1)
    session = pipe.stream(**tiny_arguments(num_frames=None, output_type="np"), async_decode=asynchronous)
    next(session)
    with pytest.raises(ArithmeticError, match="decode 1 failed"):
        next(session)
    assert list(session) == [] and session.kv_cache_bytes == 0
    if not asynchronous:
        assert watch.happened[-2:] == ["step", "step"], "nothing is written for a chunk that nobody gets"


@pytest.mark.parametrize("what", ["clean", "decode"])
@every_mode
def test_it_is_closed_by_another_thread_meanwhile(pipe, watch, what, asynchronous):
    begun, closing = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert closing.wait(WAIT)

    watch.before[what] = hold
    session = pipe.stream(**tiny_arguments(num_frames=None, output_type="np"), async_decode=asynchronous)
    consumer = threading.Thread(target=list, args=(session,), daemon=True)
    consumer.start()
    assert begun.wait(WAIT)
    closer = threading.Thread(target=session.close, daemon=True)
    closer.start()
    closing.set()
    for thread in (closer, consumer):
        thread.join(WAIT)
        assert not thread.is_alive()
    assert session.kv_cache_bytes == 0


@every_mode
def test_a_chunk_that_was_interrupted_is_handed_over_and_finished(pipe, watch, asynchronous):
    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step == 2

    arguments = tiny_arguments(num_frames=None, output_type="np", callback_on_step_end=interrupt)
    with pipe.stream(**arguments, async_decode=asynchronous) as session:
        assert [chunk.index for chunk in session] == [0, 1]
    assert sorted(watch.happened) == ["clean", "clean", "decode", "decode", "step", "step", "step"]


def test_an_adapter_chosen_between_two_chunks_leaves_the_clean_pass_before_it_alone(pipe):
    """Also where the caller has the frames while the clean pass may still be running."""
    from peft import LoraConfig

    torch.manual_seed(5)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))

    def second_cache(scale_after_first: float) -> torch.Tensor:
        pipe.transformer.set_adapters(["default"], [1.0])
        with pipe.stream(**tiny_arguments(num_frames=None, output_type="np")) as session:
            next(session)
            pipe.transformer.set_adapters(["default"], [scale_after_first])
            cache = session._denoiser.kv_caches[0]
            return torch.cat([part.clone() for part in cache[1].get(2)], dim=1)

    assert torch.equal(second_cache(1.0), second_cache(0.0))
