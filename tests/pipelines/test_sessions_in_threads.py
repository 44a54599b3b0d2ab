"""Sessions that other threads, callbacks and signal handlers reach into: each hears what is said to it, no other."""

import contextlib
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch

from longlive_diffusers import LongLivePipeline
from tests.support.tiny_pipeline import tiny_arguments, tiny_pipeline


WAIT = 20  # seconds after which something that should happen is said not to
every_mode = pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])


@pytest.fixture(scope="module")
def pipe() -> LongLivePipeline:
    return tiny_pipeline()


class Consumer(threading.Thread):
    """Iterates over a session; what it got, and how that ended."""

    def __init__(self, session):
        super().__init__(daemon=True)
        self.session, self.indices, self.end = session, [], None
        self.start()

    def run(self) -> None:
        try:
            for chunk in self.session:
                self.indices.append(chunk.index)
            self.end = "ended"
        except Exception as error:
            self.end = error

    def ended(self) -> object:
        self.join(WAIT)
        assert not self.is_alive(), "the consumer hangs"
        return self.end


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    event = threading.Event()
    for _ in range(WAIT * 100):
        if condition():
            return
        event.wait(0.01)
    raise AssertionError("it never happened")


# -- what a callback reads and writes --------------------------------------------------------------------------------


def meeting(pipe, change: Callable[[LongLivePipeline], None], modes: tuple[bool, bool]) -> tuple[list, list]:
    """Two sessions in two threads, both in mid-chunk when the first one's callback makes a change; returns, of each,
    the chunks that it made and the guidance that its callback saw."""
    both_in_step, changed = threading.Barrier(2, timeout=WAIT), threading.Barrier(2, timeout=WAIT)
    seen: tuple[list, list] = ([], [])

    def callback_of(number: int):
        def callback(pipe, step, timestep, tensors):
            if step == 0:
                both_in_step.wait()
                if number == 0:
                    change(pipe)
                changed.wait()
            seen[number].append((pipe.guidance_scale, pipe.interrupt, pipe.attention_kwargs, pipe.num_timesteps))

        return callback

    sessions = [
        pipe.stream(
            **tiny_arguments(callback_on_step_end=callback_of(number), guidance_scale=2.0 + number),
            async_decode=asynchronous,
        )
        for number, asynchronous in enumerate(modes)
    ]
    consumers = [Consumer(session) for session in sessions]
    assert [consumer.ended() for consumer in consumers] == ["ended", "ended"]
    return (consumers[0].indices, seen[0]), (consumers[1].indices, seen[1])


every_pair_of_modes = pytest.mark.parametrize("modes", [(False, False), (False, True), (True, False)], ids=str)


@every_pair_of_modes
def test_an_interrupt_ends_the_session_whose_callback_sets_it(pipe, modes):
    first, second = meeting(pipe, lambda pipe: setattr(pipe, "_interrupt", True), modes)
    assert first == ([0], [(2.0, True, None, 4)])
    assert second == ([0, 1], [(3.0, False, None, 4)] * 4)


@every_pair_of_modes
def test_guidance_is_changed_in_the_session_whose_callback_changes_it(pipe, modes):
    first, second = meeting(pipe, lambda pipe: setattr(pipe, "_guidance_scale", 5.0), modes)
    assert first == ([0, 1], [(5.0, False, None, 4)] * 4)
    assert second == ([0, 1], [(3.0, False, None, 4)] * 4)


def test_attention_arguments_are_those_of_the_session_too(pipe):
    scale = {"scale": 0.5}
    first, second = meeting(pipe, lambda pipe: setattr(pipe, "_attention_kwargs", scale), (False, False))
    assert first == ([0, 1], [(2.0, False, scale, 4)] * 4)
    assert second == ([0, 1], [(3.0, False, None, 4)] * 4)


def test_a_callback_that_advances_another_session_gets_its_own_state_back(pipe):
    inner = pipe.stream(**tiny_arguments(guidance_scale=7.0))
    seen = []

    def advance_inner(pipe, step, timestep, tensors):
        seen.append(pipe.guidance_scale)
        next(inner, None)
        seen.append(pipe.guidance_scale)

    with inner, pipe.stream(**tiny_arguments(guidance_scale=2.0, callback_on_step_end=advance_inner)) as outer:
        next(outer)
        assert seen == [2.0] * 4
    assert pipe.guidance_scale == 2.0


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_pipeline_shows_its_own_sessions(copied):
    pipe = tiny_pipeline()
    pipe(**tiny_arguments(guidance_scale=3.0))
    other = copied(pipe)
    other(**tiny_arguments(guidance_scale=4.0))
    assert (pipe.guidance_scale, other.guidance_scale) == (3.0, 4.0)


# -- closing ---------------------------------------------------------------------------------------------------------


@every_mode
def test_another_thread_closes_a_session_in_mid_chunk(pipe, asynchronous):
    """The chunk ends after its current step, and whoever waits for it gets the end; a callback cannot undo it."""
    begun, closing, steps = threading.Event(), threading.Event(), []

    def callback(pipe, step, timestep, tensors):
        steps.append(step)
        begun.set()
        assert closing.wait(WAIT)
        pipe._interrupt = False

    arguments = tiny_arguments(num_frames=None, num_inference_steps=50, callback_on_step_end=callback)
    session = pipe.stream(**arguments, async_decode=asynchronous)
    consumer = Consumer(session)
    assert begun.wait(WAIT)
    closer = threading.Thread(target=session.close, daemon=True)
    closer.start()
    wait_until(lambda: session._denoiser.run.closed)
    closing.set()
    closer.join(WAIT)
    assert not closer.is_alive()
    assert session.kv_cache_bytes == 0, "at once, when `close` returns"
    assert (consumer.ended(), consumer.indices, steps) == ("ended", [], [0])


@every_mode
@pytest.mark.parametrize("step_to_close", [0, 1, 2])
def test_a_callback_closes_its_session(pipe, asynchronous, step_to_close):
    sessions, known, steps = [], threading.Event(), []

    def callback(pipe, step, timestep, tensors):
        assert known.wait(WAIT)
        steps.append(step)
        if step == step_to_close:
            sessions[0].close()

    session = pipe.stream(**tiny_arguments(num_frames=None, callback_on_step_end=callback), async_decode=asynchronous)
    sessions.append(session)
    known.set()
    consumer = Consumer(session)
    assert consumer.ended() == "ended"
    assert steps == list(range(step_to_close + 1))
    assert consumer.indices in ([], [0][: step_to_close // 2])
    assert session.kv_cache_bytes == 0
    assert list(session) == []


def test_a_callback_frees_a_session_that_nobody_iterates_over_any_more(pipe):
    """An asynchronous session is ahead of its consumer, which may never come back."""
    sessions, known = [], threading.Event()

    def callback(pipe, step, timestep, tensors):
        assert known.wait(WAIT)
        sessions[0].close()

    session = pipe.stream(**tiny_arguments(num_frames=None, callback_on_step_end=callback), async_decode=True)
    sessions.append(session)
    wait_until(lambda: session.kv_cache_bytes > 0)
    known.set()
    wait_until(lambda: session.kv_cache_bytes == 0)


@every_mode
def test_a_session_is_closed_while_its_consumer_decodes(asynchronous):
    """As by a signal handler, which runs in the consumer's thread."""
    pipe = tiny_pipeline()
    session = pipe.stream(**tiny_arguments(num_frames=None, output_type="np"), async_decode=asynchronous)
    hook = pipe.vae.decoder.register_forward_pre_hook(lambda *_: session.close())
    consumer = Consumer(session)
    assert (consumer.ended(), consumer.indices) == ("ended", [])
    hook.remove()
    assert session.kv_cache_bytes == 0


@every_mode
def test_closing_again_and_again_from_many_threads_is_closing_once(pipe, asynchronous):
    session = pipe.stream(**tiny_arguments(num_frames=None), async_decode=asynchronous)
    closed = []
    free_hooks, session._on_close = session._on_close, lambda: closed.append(True)
    consumer = Consumer(session)
    closers = [threading.Thread(target=session.close, daemon=True) for _ in range(8)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(WAIT)
        assert not closer.is_alive()
    assert consumer.ended() == "ended"
    assert closed == [True]
    free_hooks()


@every_mode
def test_a_callback_cannot_ask_its_own_session_for_a_chunk(pipe, asynchronous):
    sessions, known = [], threading.Event()

    def callback(pipe, step, timestep, tensors):
        assert known.wait(WAIT)
        next(sessions[0])

    session = pipe.stream(**tiny_arguments(callback_on_step_end=callback), async_decode=asynchronous)
    sessions.append(session)
    known.set()
    error = Consumer(session).ended()
    assert isinstance(error, ValueError) and "cannot ask its own session" in str(error)
    assert session.kv_cache_bytes == 0


def test_two_threads_share_the_chunks_of_a_session(pipe):
    with pipe.stream(**tiny_arguments(num_frames=45)) as session:
        consumers = [Consumer(session) for _ in range(2)]
        assert [consumer.ended() for consumer in consumers] == ["ended", "ended"]
    assert sorted(consumers[0].indices + consumers[1].indices) == list(range(6))


# -- out of memory ---------------------------------------------------------------------------------------------------


def run_out(*_):
    raise torch.OutOfMemoryError("Tried to allocate 9.70 GiB.")


@pytest.mark.parametrize("where", ["text encoder", "caches", "first chunk", "later chunk", "decoder"])
@every_mode
def test_running_out_of_memory_leaves_nothing_behind(monkeypatch, where, asynchronous):
    pipe = tiny_pipeline()
    arguments = {"num_frames": 13, "output_type": "np"}
    expected = pipe(**tiny_arguments(**arguments)).frames
    freed = []
    with monkeypatch.context() as patched:
        patched.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
        hooks = []
        if where == "text encoder":
            hooks.append(pipe.text_encoder.register_forward_pre_hook(run_out))
        elif where == "caches":
            patched.setattr(pipe.transformer, "create_kv_cache", failing_on_a_device(pipe.transformer.create_kv_cache))
        elif where == "decoder":
            hooks.append(pipe.vae.decoder.register_forward_pre_hook(run_out))
        step_to_fail = {"first chunk": 0, "later chunk": 3}.get(where)
        with pytest.raises(torch.OutOfMemoryError, match=r"9\.70 GiB") as raised:
            session = pipe.stream(
                **tiny_arguments(
                    **arguments, callback_on_step_end=lambda p, step, *_: None if step != step_to_fail else run_out()
                ),
                async_decode=asynchronous,
            )
            list(session)
        for hook in hooks:
            hook.remove()
    assert freed == [True]
    if where != "text encoder":
        assert session.kv_cache_bytes == 0 and list(session) == []
        assert "`window_size`" in raised.value.__notes__[0]
    assert (pipe(**tiny_arguments(**arguments)).frames == expected).all()


def failing_on_a_device(create_kv_cache):
    def create(*args, device, **kwargs):
        return create_kv_cache(*args, device=device, **kwargs) if device == "meta" else run_out()

    return create


# -- what else may happen meanwhile ----------------------------------------------------------------------------------


@every_mode
def test_a_session_that_failed_holds_nothing(asynchronous):
    """While its variable lives: an error has the KV caches in its traceback, which nobody may keep."""
    pipe, caches = tiny_pipeline(), []

    def fail(pipe, step, timestep, tensors):
        caches.extend(weakref.ref(cache) for cache in session._denoiser.own_caches)
        raise torch.OutOfMemoryError("no room")

    session = pipe.stream(**tiny_arguments(callback_on_step_end=fail), async_decode=asynchronous)
    with contextlib.suppress(torch.OutOfMemoryError):
        list(session)
    gc.collect()
    assert len(caches) == 1 and caches[0]() is None


def test_a_callback_and_another_session_of_its_thread(pipe):
    """Both denoise in one thread: the other cannot make a chunk meanwhile, but be closed, begun or not."""
    others = [pipe.stream(**tiny_arguments(), async_decode=True) for _ in range(2)]
    next(others[0])
    refused = []

    def use_others(pipe, step, timestep, tensors):
        for other in others:
            with pytest.raises(ValueError, match="both denoise in the thread that this callback keeps busy"):
                next(other)
            other.close()
        refused.append(step)

    consumer = Consumer(pipe.stream(**tiny_arguments(callback_on_step_end=use_others), async_decode=True))
    assert consumer.ended() == "ended" and len(refused) == 4
    assert all(list(other) == [] and other.kv_cache_bytes == 0 for other in others)


def test_a_callback_closes_a_session_that_another_thread_waits_for(pipe):
    """Which cannot come to its end before the callback has."""
    begun = threading.Event()

    def close_other(pipe, step, timestep, tensors):
        begun.wait(WAIT)
        other.session.close()

    first = pipe.stream(**tiny_arguments(callback_on_step_end=close_other), async_decode=True)
    other = Consumer(pipe.stream(**tiny_arguments(num_frames=None), async_decode=True))
    begun.set()
    assert Consumer(first).ended() == "ended"
    assert other.ended() == "ended" and other.session.kv_cache_bytes == 0


class InterruptedLock:
    """Runs a signal handler before it is taken, when it was, and before it is given back."""

    def __init__(self, handler: Callable[[], object]):
        self.lock, self.handler = threading.Lock(), handler

    def __enter__(self) -> None:
        self.handler()
        self.lock.acquire()
        self.handler()

    def __exit__(self, *_: object) -> None:
        self.handler()
        self.lock.release()
        self.handler()


@every_mode
@pytest.mark.parametrize("within", ["close", "next"])
def test_a_signal_handler_closes_at_any_time(within, asynchronous):
    pipe, freed = tiny_pipeline(), []
    session = pipe.stream(**tiny_arguments(num_frames=None), async_decode=asynchronous)
    next(session)
    session._turn = InterruptedLock(session.close)
    session._on_close = lambda: (freed.append(True), session.close())
    closing = threading.Thread(target=session.close if within == "close" else lambda: next(session, None), daemon=True)
    closing.start()
    closing.join(WAIT)
    assert not closing.is_alive() and freed == [True] and session.kv_cache_bytes == 0
    assert list(session) == []
