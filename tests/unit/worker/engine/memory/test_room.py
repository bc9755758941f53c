"""Which requests the device has memory for now: their keys and values, and their prompt twice."""

from mlx_serving.worker.engine.interface import Request, RequestChoice, SamplingParams
from mlx_serving.worker.engine.memory.guard import RELAX_LOOKS, MemoryRoom


def request(prompt: int, max_tokens: int = 10, choices: int = 1) -> Request:
    indices = tuple(map(RequestChoice, range(choices)))
    return Request("a", (1,) * prompt, SamplingParams(), max_tokens, choices=indices)


def paged(room: int | None = None) -> MemoryRoom:
    made = MemoryRoom(block_tokens=32)
    if room is not None:
        made.look(room)
    return made


def is_starved(room: MemoryRoom) -> bool:
    return room.starved


def admits(room: MemoryRoom, asked: Request, used: int = 100, rows: int = 1, kept: int = 0) -> bool:
    return room.admits(asked.kv_tokens, asked.prefill_tokens, used=used, rows=rows, kept=kept)


def test_before_anybody_looked_the_budget_alone_decides() -> None:
    assert admits(paged(), request(10_000))


def test_a_prompt_is_there_twice_until_it_has_joined() -> None:
    room = paged(100 + 50 + 10 + 50)
    assert admits(room, request(50))
    assert not admits(room, request(51))


def test_choices_share_the_copy() -> None:
    asked = request(50, choices=3)
    assert admits(paged(100 + 3 * 60 + 50), asked)
    assert not admits(paged(100 + 3 * 60 + 49), asked)


def test_padded_rows_all_get_as_wide_as_the_widest() -> None:
    room = MemoryRoom()
    room.look(3 * 60 + 50)
    assert admits(room, request(50), used=2 * 30, rows=2)
    assert not admits(room, request(51), used=2 * 30, rows=2)
    assert not admits(room, request(5), used=2 * 80, rows=2)


def test_idle_prefixes_take_memory_until_they_are_given_up() -> None:
    """They are free for rows, but not for the copy; the guard is told that they are in the way."""
    room = paged(300)
    assert admits(room, request(50), kept=250)
    assert not is_starved(room)
    assert not admits(room, request(50), kept=251)
    assert is_starved(room)
    assert not admits(room, request(500), kept=251)
    assert not is_starved(room)  # it would not fit without them either
    admits(room, request(50), kept=251)
    room.look(300)
    assert not is_starved(room)


def test_an_empty_engine_takes_what_its_budget_allows() -> None:
    """Else a job that fits would wait for good; unless there is no memory at all."""
    assert admits(paged(1), request(50), used=0, rows=0)
    assert not admits(paged(0), request(50), used=0, rows=0)


def test_idle_prefixes_of_an_empty_engine_make_room_first() -> None:
    room = paged(100)
    assert not admits(room, request(80), used=0, rows=0, kept=64)
    assert is_starved(room)
    assert admits(room, request(80), used=0, rows=0, kept=0)


def test_an_out_of_memory_error_halves_what_is_let_in_and_time_doubles_it() -> None:
    room = paged(10_000)
    room.strike(400)
    assert room.tokens == 200
    for _ in range(RELAX_LOOKS - 1):
        room.look(10_000)
    assert room.tokens == 200
    room.look(10_000)
    assert room.tokens == 400
    for _ in range(6 * RELAX_LOOKS):
        room.look(10_000)
    assert room.tokens == 10_000


def test_a_second_error_halves_it_again() -> None:
    room = paged(10_000)
    room.strike(400)
    room.strike(160)
    assert room.tokens == 80
    assert admits(room, request(50), used=0, rows=0)
