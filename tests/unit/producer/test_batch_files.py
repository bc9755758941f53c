"""Bulk files on disk: lines and their places, the order, torn tails, what a crash leaves."""

import io
import json
import os
import random
import threading
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mlx_serving.common.errors import BatchNotFound, InvalidBatch
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.common.results import ChoiceResult, GenerationResult
from mlx_serving.common.states import JobState
from mlx_serving.producer.batch.folder import BatchFolder, BatchState, InputFile
from mlx_serving.producer.batch.index import ExternalSorter, LinePlace, prefix_key, read_places
from mlx_serving.producer.batch.line_set import LineSet
from mlx_serving.producer.batch.objects import CHAT, Batch, LineError
from mlx_serving.producer.batch.options import BatchOptions
from mlx_serving.producer.batch.records import line_of, record_id
from mlx_serving.producer.batch.result_file import copy_lines, whole_lines
from mlx_serving.producer.batch.results import Results
from mlx_serving.producer.batch.validation import Validation, read_lines
from mlx_serving.producer.batch.window import SubmittedLine

BATCH = "batch_0123456789abcdef"


def made(tmp_path: Path, lines: Iterable[Any], **options: Any) -> tuple[BatchFolder, BatchState]:
    source = tmp_path / "requests.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    source.write_text("".join(f"{text}\n" for text in texts))
    folder = BatchFolder.create(tmp_path / "batch")
    batch = Batch(id=BATCH, input_file_id=str(source), created_at=1)
    state = BatchState(
        batch=batch, options=BatchOptions.build(**options), input=InputFile(str(source))
    )
    Validation(folder, state, None).run()
    return folder, state


def chat(custom_id: str, *turns: str, model: str = "tally") -> dict[str, Any]:
    roles = ["system", "user"] if len(turns) == 2 else ["user"]
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
    body = {"model": model, "messages": messages}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def fed(folder: BatchFolder, state: BatchState) -> list[int]:
    return [
        place.line
        for section in state.sections
        for place in read_places(folder.index, section.first, section.count)
    ]


class TestReading:
    def test_lines_have_numbers_and_places(self) -> None:
        text = b'\xef\xbb\xbf"a"\n\n  \r\n"b"\r\n"c"'
        lines = list(read_lines(io.BytesIO(text), 100))
        assert [line.number for line in lines] == [1, 4, 5]
        assert [text[line.offset :][: line.length] for line in lines] == [
            b'"a"\n', b'"b"\r\n', b'"c"',
        ]  # fmt: skip

    @pytest.mark.parametrize("length", [9, 10, 11, 25, 100])
    def test_a_line_that_is_too_long_is_told_and_passed(self, length: int) -> None:
        text = b"x" * length + b"\nshort\n"
        long, short = read_lines(io.BytesIO(text), 10)
        assert (long.data is None) == (length >= 10)
        assert long.length == length + 1
        assert (short.number, short.data) == (2, b"short\n")


class TestSorting:
    @pytest.mark.parametrize("count", [0, 1, 7, 100, 1000])
    def test_any_number_of_runs_comes_out_in_order(self, tmp_path: Path, count: int) -> None:
        rng = random.Random(count)
        records = [rng.randbytes(6) for _ in range(count)]
        with ExternalSorter(tmp_path, 6, run_records=7) as sorter:
            for record in records:
                sorter.add(record)
            assert list(sorter.merged()) == sorted(records)
        assert list(tmp_path.iterdir()) == []


class TestOrder:
    SYSTEMS = ("You are brief. " * 40, "You are kind. " * 40, "You translate. " * 40)

    def lines(self, count: int) -> list[dict[str, Any]]:
        rng = random.Random(3)
        return [
            chat(str(i), rng.choice(self.SYSTEMS), f"question {i}", model=rng.choice(["a", "b"]))
            for i in range(1, count + 1)
        ]

    def test_by_model_then_by_system_prompt_then_as_they_stand(self, tmp_path: Path) -> None:
        lines = self.lines(60)
        folder, state = made(tmp_path, lines)
        order = fed(folder, state)
        assert sorted(order) == list(range(1, 61))
        told = [(lines[n - 1]["body"]["model"], lines[n - 1]["body"]["messages"][0]) for n in order]
        changes = sum(a != b for a, b in pairwise(told))
        assert changes == 2 * len(self.SYSTEMS) - 1
        assert {section.model: section.count for section in state.sections} == {
            model: sum(line["body"]["model"] == model for line in lines) for model in "ab"
        }

    def test_file_order_is_kept_within_a_model(self, tmp_path: Path) -> None:
        lines = self.lines(60)
        folder, state = made(tmp_path, lines, order="file")
        order = fed(folder, state)
        for model in "ab":
            of_model = [n for n in order if lines[n - 1]["body"]["model"] == model]
            assert of_model == sorted(of_model)

    def test_prompts_that_begin_alike_have_keys_that_do(self) -> None:
        def key(text: str) -> bytes:
            return prefix_key(GenerationJob.build(model="tally", prompt=text))

        shared = "x" * 300
        assert key(shared + "a")[:24] == key(shared + "b")[:24]
        assert key(shared + "a") != key(shared + "b")
        assert key("y" + shared)[8:16] != key(shared)[8:16]

    def test_tools_are_a_part_of_the_prefix(self) -> None:
        def key(**fields: Any) -> bytes:
            messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
            return prefix_key(GenerationJob.build(model="tally", messages=messages, **fields))

        tool = {"type": "function", "function": {"name": "f"}}
        assert key()[:8] != key(tools=[tool])[:8]
        assert key()[8:] == key(tools=[tool])[8:]


class TestValidation:
    def test_bad_lines_are_error_lines_and_the_others_run(self, tmp_path: Path) -> None:
        lines = [chat("a", "x"), "{", chat("a", "y"), chat("b", "z") | {"method": "GET"}, "", '"p"']
        folder, state = made(tmp_path, lines)
        assert fed(folder, state) == [1]
        counts = state.batch.request_counts
        assert (state.batch.status, counts.total, counts.failed) == ("in_progress", 5, 4)
        errors = [json.loads(line) for line in folder.errors.read_text().splitlines()]
        found = {e["error"]["line"]: (e["error"]["code"], e["error"]["param"]) for e in errors}
        assert found == {
            2: ("invalid_json_line", None),
            3: ("duplicate_custom_id", "custom_id"),
            4: ("invalid_request", "method"),
            6: ("invalid_request", "model"),
        }
        named = state.batch.errors
        assert named is not None
        assert [error.line for error in named.data] == [2, 3, 4, 6]
        assert {e["custom_id"] for e in errors} == {None, "a", "b", "line-6"}

    def test_strict_runs_nothing_where_a_line_is_wrong(self, tmp_path: Path) -> None:
        _, state = made(tmp_path, [chat("a", "x"), "{"], strict=True)
        assert state.batch.status == "failed"
        assert state.batch.failed_at is not None

    @pytest.mark.parametrize("lines", [[], ["{"]])
    def test_without_a_line_that_can_be_run_it_fails(self, tmp_path: Path, lines: Any) -> None:
        _, state = made(tmp_path, lines)
        assert state.batch.status == "failed"
        assert state.batch.errors is not None

    def test_a_second_pass_starts_from_nothing(self, tmp_path: Path) -> None:
        folder, state = made(tmp_path, [chat("a", "x"), "{"])
        before = (folder.errors.read_bytes(), folder.index.read_bytes())
        Validation(folder, state, None).run()
        assert (folder.errors.read_bytes(), folder.index.read_bytes()) == before
        assert state.batch.request_counts.total == 2

    def test_what_is_ignored_is_counted(self, tmp_path: Path) -> None:
        line = chat("a", "x")
        line["body"] |= {"user": "u", "store": True}
        _, state = made(tmp_path, [line, chat("b", "x")])
        assert state.ignored == {"store": 1, "user": 1}

    def test_more_models_than_can_be_fed_apart_are_refused(self, tmp_path: Path) -> None:
        lines = [chat(str(n), "x", model=f"m{n}") for n in range(258)]
        folder, state = made(tmp_path, lines)
        assert len(fed(folder, state)) == 256
        assert state.batch.request_counts.failed == 2


def flight(line: int) -> SubmittedLine:
    return SubmittedLine(LinePlace(line, 0, 1), f"job-{line}", f"id-{line}", CHAT, "tally")


def answer(line: int) -> GenerationResult:
    choice = ChoiceResult(index=0, text=f"text {line}", finish_reason="stop")
    return GenerationResult(id=f"job-{line}", state=JobState.FINISHED, choices=[choice])


class TestCopies:
    LINES = (b"1\n", b"2\n")

    def test_a_link_stays_and_its_file_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("old")
        (tmp_path / "link").symlink_to(tmp_path / "file")
        assert copy_lines(iter(self.LINES), tmp_path / "link") == 2
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_bytes() == b"1\n2\n"
        assert len(list(tmp_path.iterdir())) == 2

    def test_a_pipe_is_written_to_and_never_replaced(self, tmp_path: Path) -> None:
        os.mkfifo(pipe := tmp_path / "pipe")
        read: list[bytes] = []
        reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
        reader.start()
        assert copy_lines(iter(self.LINES), pipe) == 2
        reader.join(5)
        assert read == [b"1\n2\n"]
        assert pipe.is_fifo()

    @pytest.mark.parametrize("path", ["", "nowhere/out.jsonl"])
    def test_what_can_be_no_file_is_refused(self, tmp_path: Path, path: str) -> None:
        with pytest.raises(InvalidBatch, match=r"output: .*folder"):
            copy_lines(iter(self.LINES), tmp_path / path)
        assert list(tmp_path.iterdir()) == []


class TestResults:
    def written(self, tmp_path: Path, lines: Iterable[int]) -> BatchFolder:
        folder = BatchFolder.create(tmp_path / "batch")
        results = Results(folder, BATCH)
        for line in lines:
            results.finished(flight(line), answer(line))
        results.failed_line(99, "id-99", LineError(code="c", message="m", line=99))
        results.sync()
        results.close()
        return folder

    def test_a_new_runner_reads_what_has_ended(self, tmp_path: Path) -> None:
        folder = self.written(tmp_path, [3, 1])
        results = Results(folder, BATCH)
        assert (results.completed, results.failed, results.cut_bytes) == (2, 1, 0)
        assert [line for line in range(1, 101) if line in results.done] == [1, 3, 99]
        results.close()

    def test_a_second_answer_to_a_line_is_dropped(self, tmp_path: Path) -> None:
        folder = self.written(tmp_path, [1, 1, 99])
        assert len(folder.output.read_bytes().splitlines()) == 2
        results = Results(folder, BATCH)
        results.finished(flight(1), answer(1))
        results.failed_line(1, None, LineError(code="c", message="m"))
        assert results.completed == 2
        results.close()
        assert len(folder.output.read_bytes().splitlines()) == 2

    @pytest.mark.parametrize("cut", range(1, 40))
    def test_a_torn_tail_is_cut_wherever_it_was_torn(self, tmp_path: Path, cut: int) -> None:
        folder = self.written(tmp_path, [1, 2, 3])
        whole = folder.output.read_bytes()
        first_two = b"".join(whole.splitlines(keepends=True)[:2])
        folder.output.write_bytes(whole[:-cut])
        results = Results(folder, BATCH)
        assert results.completed == 2
        assert 3 not in results.done
        assert folder.output.read_bytes() == first_two
        results.finished(flight(3), answer(3))
        results.close()
        assert folder.output.read_bytes() == whole

    @pytest.mark.parametrize("rubbish", [b"\0" * 100, b"\0" * 9 + b"\n", b"{}\n", b"[1]\n"])
    def test_blocks_that_never_reached_the_disk_are_cut(
        self, tmp_path: Path, rubbish: bytes
    ) -> None:
        folder = self.written(tmp_path, [1, 2])
        whole = folder.output.read_bytes()
        folder.output.write_bytes(whole + rubbish)
        results = Results(folder, BATCH)
        assert (results.completed, results.cut_bytes) == (2, len(rubbish))
        results.close()
        assert folder.output.read_bytes() == whole

    def test_what_was_written_before_a_sync_is_in_the_files(self, tmp_path: Path) -> None:
        folder = BatchFolder.create(tmp_path / "batch")
        results = Results(folder, BATCH)
        results.finished(flight(1), answer(1))
        results.failed_line(2, "id-2", LineError(code="c", message="m", line=2))
        results.sync()
        lines = [folder.output.read_bytes(), folder.errors.read_bytes()]  # as after a kill
        results.close()
        assert [json.loads(line)["custom_id"] for line in lines] == ["id-1", "id-2"]

    def test_a_line_without_an_answer_is_cut_and_runs_again(self, tmp_path: Path) -> None:
        folder = self.written(tmp_path, [1, 2])
        whole = folder.output.read_bytes()
        first, second = whole.splitlines(keepends=True)
        bare = json.loads(second) | {"response": None}
        folder.output.write_bytes(first + json.dumps(bare).encode() + b"\n")
        results = Results(folder, BATCH)
        assert (results.completed, 2 in results.done) == (1, False)
        assert folder.output.read_bytes() == first
        results.finished(flight(2), answer(2))
        results.close()
        assert folder.output.read_bytes() == whole

    def test_an_export_has_whole_lines_once(self, tmp_path: Path) -> None:
        folder = self.written(tmp_path, [1, 2])
        whole = folder.output.read_bytes()
        folder.output.write_bytes(whole + whole + b'{"id": "batch_req')
        assert b"".join(whole_lines(folder.output, BATCH)) == whole
        assert copy_lines(whole_lines(folder.output, BATCH), tmp_path / "out.jsonl") == 2
        assert (tmp_path / "out.jsonl").read_bytes() == whole
        assert list(whole_lines(tmp_path / "none", BATCH)) == []

    def test_the_id_of_a_result_names_its_line(self) -> None:
        assert line_of(record_id(BATCH, 12), BATCH) == 12
        assert line_of(record_id("batch_ffff", 12), BATCH) is None
        assert line_of("batch_req_x", BATCH) is None


class TestLineSet:
    def test_it_remembers_each_line_once(self) -> None:
        lines = LineSet()
        assert [lines.add(n) for n in (1, 100_000, 1, 8, 100_000)] == [
            True, True, False, True, False,
        ]  # fmt: skip
        assert [n for n in (1, 2, 8, 9, 100_000, 10**9) if n in lines] == [1, 8, 100_000]


class TestFolder:
    def test_the_state_is_replaced_as_a_whole(self, tmp_path: Path) -> None:
        folder, state = made(tmp_path, [chat("a", "x")])
        folder.write(state)
        assert BatchFolder.open(folder.path).read() == state
        assert not list(folder.path.glob("*.part"))

    def test_only_one_may_run_it(self, tmp_path: Path) -> None:
        folder, _ = made(tmp_path, [chat("a", "x")])
        with folder.lock() as first, BatchFolder(folder.path).lock() as second:
            assert (first, second) == (True, False)
        with folder.lock() as again:
            assert again

    def test_what_is_not_there_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(BatchNotFound):
            BatchFolder.open(tmp_path)
        (tmp_path / "batch.json").write_text("{")
        with pytest.raises(InvalidBatch, match=r"batch\.json"):
            BatchFolder.open(tmp_path).read()
        with pytest.raises(InvalidBatch, match="folder"):
            BatchFolder.create(tmp_path)
