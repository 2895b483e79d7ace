"""Pushes from a running training: none is lost, none is made twice, and training never notices."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from hub_client import HubClient, start_client
from hub_server import HubServer
from tinygpt.checkpoint import list_checkpoints
from tinygpt.errors import ConfigError, HubError
from tinygpt.publish import PushQueue, _pending, finish_pushes, pending_pushes
from tinygpt.publish._pending import lock

TESTS = str(Path(__file__).parent.parent)

SETUP = """
import logging, sys
if tests not in sys.path:
    sys.path.insert(0, tests)
from pathlib import Path
from tiny_run import train
from tinygpt.publish import PushQueue, finish_pushes, pending_pushes
from tinygpt.publish import _queue
_queue._FIRST_WAIT_SECONDS = first_wait
class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
lines = []
logging.getLogger("tinygpt").handlers = [Lines()]
logging.getLogger("tinygpt").setLevel(logging.INFO)
out = Path(folder)
"""
TRAIN = """
with PushQueue("user/tiny", **options) as queue:
    trainer = train(out, 6, keep_last=1, on_save=queue)
result = {"left": [str(push) for push in queue.pending], "lines": lines, "step": trainer.next_step}
"""
QUEUE = """
queue = PushQueue("user/tiny", **options)
for checkpoint in checkpoints:
    queue(Path(checkpoint))
"""


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The run with a card in each checkpoint, so that nothing is drawn."""
    folder = tmp_path / "tiny"
    shutil.copytree(run, folder)
    for checkpoint in checkpoints_of(folder):
        (Path(checkpoint) / "README.md").write_text("---\nlibrary_name: tinygpt\n---\n")
    return folder


def checkpoints_of(run: Path) -> list[str]:
    return [str(run / "checkpoints" / f"step-{step:06d}") for step in (2, 4, 6)]


def do(client: HubClient, code: str, out: Path, first_wait: float = 0.02, **options: object) -> dict[str, object]:
    return client.run(
        SETUP + code,
        tests=TESTS,
        folder=str(out),
        first_wait=first_wait,
        options=options,
        checkpoints=checkpoints_of(out),
    )


def weights(run: Path) -> bytes:
    return (run / "checkpoints" / "step-000006" / "model.safetensors").read_bytes()


def tags_in_order(hub: HubServer) -> list[str]:
    repo = hub.repos["user/tiny"]
    by_commit = {commit: tag for tag, commit in repo.tags.items()}
    return [by_commit[commit] for commit in reversed(repo.history("main")) if commit in by_commit]


def test_every_checkpoint_of_a_run_arrives_with_its_tag_and_card(
    hub: HubServer, client: HubClient, tmp_path: Path
) -> None:
    done = do(client, TRAIN, tmp_path / "tiny", private=True)
    assert (done["left"], done["step"]) == ([], 6)
    repo = hub.repos["user/tiny"]
    assert repo.private
    assert tags_in_order(hub) == ["step-2", "step-4", "step-6"]
    assert repo.files()["model.safetensors"] == weights(tmp_path / "tiny")
    card = repo.files("step-4")["README.md"].decode()
    assert "| steps | 4 |" in card
    assert 'resolve("user/tiny", revision="step-4")' in card
    assert repo.titles[repo.tags["step-6"]] == "Checkpoint after 6 steps"
    noted = [json.loads(line) for line in (tmp_path / "tiny/push-queue/pushed.jsonl").read_text().splitlines()]
    assert [line["tags"] for line in noted] == [["step-2"], ["step-4"], ["step-6"]]
    assert len([line for line in done["lines"] if line.startswith("pushed in")]) == 3


def test_a_hub_that_refuses_stops_nothing_and_what_is_left_is_finished_later(
    hub: HubServer, client: HubClient, tmp_path: Path
) -> None:
    hub.fail("POST", "/api/repos/create", status=401)
    done = do(client, TRAIN, tmp_path / "tiny")
    assert done["step"] == 6
    assert len(done["left"]) == 3
    reports = [line for line in done["lines"] if "access denied (HTTP 401)" in line]
    assert [line[:30] for line in reports] == ["a checkpoint is not pushed yet", "3 checkpoints are not pushed y"]
    assert reports[-1].endswith(f"`tinygpt push {tmp_path / 'tiny'}` finishes them.")
    assert len(list_checkpoints(tmp_path / "tiny" / "checkpoints")) == 1  # the others are gone, their pushes not
    pending = pending_pushes(tmp_path / "tiny")
    assert [push.step for push in pending] == [2, 4, 6]
    assert "access denied" in str(pending[0].error)

    hub.heal()
    commits = do(client, "result = finish_pushes(out)", tmp_path / "tiny")
    assert len(commits) == 3
    assert pending_pushes(tmp_path / "tiny") == []
    assert tags_in_order(hub) == ["step-2", "step-4", "step-6"]
    assert hub.repos["user/tiny"].files()["model.safetensors"] == weights(tmp_path / "tiny")
    assert do(client, "result = finish_pushes(out)", tmp_path / "tiny") == []


def test_a_failure_that_passes_is_tried_again_by_itself(hub: HubServer, client: HubClient, copy: Path) -> None:
    hub.fail("POST", "/commit/", status=503, times=4)
    code = """
while queue.pending:
    sleep(0.01)
result = queue.close()
"""
    assert do(client, QUEUE + code, copy) == []
    hub.repos.clear()
    hub.fail("POST", "/commit/", status=503, times=4)
    assert do(client, QUEUE + "result = queue.close()", copy) == []  # also while it is being closed
    assert hub.left_to_fail() == 0
    assert tags_in_order(hub) == ["step-2", "step-4", "step-6"]


def test_waits_grow_to_a_bound_and_a_refusal_waits_for_the_next_checkpoint(
    hub: HubServer, client: HubClient, copy: Path
) -> None:
    hub.fail("POST", "/api/repos/create", status=500, times=3)
    hub.fail("POST", "/api/repos/create", status=403)
    code = """
pauses = []
class Waits:
    def __init__(self, condition):
        self.condition = condition
    def __getattr__(self, name):
        return getattr(self.condition, name)
    def __enter__(self):
        return self.condition.__enter__()
    def __exit__(self, *rest):
        return self.condition.__exit__(*rest)
    def wait(self, timeout=None):
        pauses.append(timeout)
        return self.condition.wait(timeout if timeout is None else 0.001)
queue._changed = Waits(queue._changed)
queue(Path(checkpoints[0]))
while None not in pauses:
    sleep(0.01)
queue.close()
result = pauses
"""
    start = 'queue = PushQueue("user/tiny", **options)\n'
    pauses = do(client, start + code, copy, first_wait=400.0)
    assert pauses[-1] is None
    first, second, third = pauses[:3]
    assert 300 <= first <= 500
    assert 450 <= second <= 750
    assert 450 <= third <= 750


def test_a_slow_hub_slows_neither_training_nor_the_end(hub: HubServer, client: HubClient, copy: Path) -> None:
    hub.stall("POST", "/commit/", seconds=3)
    code = """
import time
started = time.monotonic()
for checkpoint in checkpoints:
    queue(Path(checkpoint))
taken = time.monotonic() - started
left = queue.close(0.2)
result = [taken, time.monotonic() - started, len(left)]
"""
    taken, ended, left = do(client, 'queue = PushQueue("user/tiny", **options)\n' + code, copy)
    assert taken < 1.5
    assert ended < 2.5
    assert left == 3
    time.sleep(0.01)
    do(client, "queue.close(20)", copy)  # the thread is still there and finishes
    assert tags_in_order(hub) == ["step-2", "step-4", "step-6"]


def test_a_process_killed_after_the_commit_is_recognized_and_nothing_is_doubled(
    hub: HubServer, client: HubClient, copy: Path, tmp_path: Path
) -> None:
    hub.fail("POST", "/api/repos/create", status=401)
    do(client, QUEUE + "queue.close()", copy)
    hub.heal()
    hub.stall("POST", "/tag/", seconds=0.5)
    with start_client(hub, tmp_path / "home") as doomed:
        doomed._process.stdin.write(
            json.dumps(
                {"code": "from tinygpt.publish import finish_pushes\nfinish_pushes(out)", "values": {"out": str(copy)}}
            )
            + "\n"
        )
        doomed._process.stdin.flush()
        while not hub.count("POST", "/tag/"):
            time.sleep(0.01)
    commits = len(hub.repos["user/tiny"].commits)
    assert len(pending_pushes(copy)) == 3
    do(client, "finish_pushes(out)", copy)
    assert len(hub.repos["user/tiny"].commits) == commits + 2
    assert tags_in_order(hub) == ["step-2", "step-4", "step-6"]


def test_a_step_that_a_resumed_run_saves_again_is_the_same_push(hub: HubServer, client: HubClient, copy: Path) -> None:
    do(client, QUEUE + "queue.close()", copy)
    commits = len(hub.repos["user/tiny"].commits)
    (Path(checkpoints_of(copy)[2]) / "README.md").write_text("---\nlibrary_name: tinygpt\n---\nother times\n")
    again = 'queue = PushQueue("user/tiny", **options)\nqueue(Path(checkpoints[2]))\nresult = queue.close()\n'
    assert do(client, again, copy) == []
    assert len(hub.repos["user/tiny"].commits) == commits


def test_the_token_is_written_nowhere(hub: HubServer, client: HubClient, copy: Path) -> None:
    secret = "hf_verySecret42"
    hub.fail("POST", "/api/repos/create", status=400, headers={"X-Error-Message": f"you sent {secret}"})
    done = do(client, QUEUE + "left = queue.close()\nresult = [str(left), lines]", copy, token=secret)
    assert "you sent <token>" in str(done)
    assert secret not in str(done)
    for path in copy.rglob("*"):
        assert path.is_dir() or secret.encode() not in path.read_bytes(), path


def test_a_damaged_push_is_set_aside_and_holds_up_no_other(hub: HubServer, client: HubClient, copy: Path) -> None:
    hub.fail("POST", "/api/repos/create", status=401)
    do(client, QUEUE + "queue.close()", copy)
    hub.heal()
    damaged = copy / "push-queue" / "000001-step-000002" / "model" / "model.safetensors"
    content = damaged.read_bytes()
    damaged.unlink()
    damaged.write_bytes(content[:-1] + b"x")
    assert len(do(client, "result = finish_pushes(out)", copy)) == 2
    assert tags_in_order(hub) == ["step-4", "step-6"]
    assert (copy / "push-queue" / "damaged-000001-step-000002").is_dir()


def test_when_too_many_wait_the_oldest_but_the_first_are_given_up(
    hub: HubServer, client: HubClient, copy: Path
) -> None:
    hub.fail("POST", "/api/repos/create", status=401)
    done = do(client, QUEUE + "queue.close()\nresult = lines", copy, max_pending=2)
    assert [push.step for push in pending_pushes(copy)] == [2, 6]
    assert any(line.startswith("given up, since 2 pushes are waiting: 000002-step-000004") for line in done)


def test_a_queue_that_cannot_be_written_is_told_and_training_goes_on(
    hub: HubServer, client: HubClient, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = do(client, TRAIN, tmp_path / "tiny", folder=str(tmp_path / "file" / "elsewhere"))
    assert done["step"] == 6
    assert len([line for line in done["lines"] if "is not going to be pushed" in line]) == 3


def test_a_broken_metrics_file_costs_the_card_and_not_the_push(
    hub: HubServer, client: HubClient, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "tiny")
    (tmp_path / "tiny" / "metrics.jsonl").write_text("broken\n")
    done = do(client, QUEUE + "queue.close()\nresult = lines", tmp_path / "tiny")
    assert any("is pushed without a card: " in line for line in done)
    assert "README.md" not in hub.repos["user/tiny"].files()
    assert tags_in_order(hub) == ["step-2", "step-4", "step-6"]


def test_tags_are_what_was_asked_for(hub: HubServer, client: HubClient, copy: Path) -> None:
    do(client, QUEUE + "queue.close()", copy, tag="seed1/{step}", branch="seed1")
    assert set(hub.repos["user/tiny"].tags) == {"seed1/2", "seed1/4", "seed1/6"}
    assert len(hub.repos["user/tiny"].history("seed1")) == 4
    assert len(hub.repos["user/tiny"].history("main")) == 1
    hub.repos.clear()
    do(client, QUEUE + "queue.close()", copy, tag=None)
    assert hub.repos["user/tiny"].tags == {}
    assert len(hub.repos["user/tiny"].history("main")) == 4


def test_training_with_a_queue_is_bit_for_bit_training_without(
    hub: HubServer, client: HubClient, tmp_path: Path
) -> None:
    hub.fail("POST", "/commit/", status=503, times=2)
    code = """
import random, torch
states = []
for name, on_save in (("without", None), ("with", PushQueue("user/tiny"))):
    random.seed(1)
    train(out / name, 6, on_save=on_save)
    states.append((random.getstate(), torch.get_rng_state().tolist()))
on_save.close()
result = states[0] == states[1]
"""
    assert do(client, code, tmp_path)
    assert tags_in_order(hub) == ["step-2", "step-4", "step-6"]
    assert weights(tmp_path / "with") == weights(tmp_path / "without")


def test_only_one_process_pushes_from_a_queue(copy: Path) -> None:
    queue = PushQueue("user/tiny")
    push = queue._add(Path(checkpoints_of(copy)[0]))
    assert [other.name for other in queue.pending] == [push.name] == ["000001-step-000002"]
    with lock(copy / "push-queue") as free:
        assert free
        with pytest.raises(HubError, match=r"another process is pushing from .*push-queue; wait for it to end"):
            finish_pushes(copy)
    assert queue._add(Path(checkpoints_of(copy)[1])).name == "000002-step-000004"


def test_links_share_the_disk_with_the_checkpoint(copy: Path) -> None:
    PushQueue("user/tiny")._add(Path(checkpoints_of(copy)[0]))
    linked = copy / "push-queue" / "000001-step-000002" / "model" / "model.safetensors"
    assert os.path.samefile(linked, copy / "checkpoints" / "step-000002" / "model.safetensors")


def test_a_record_that_cannot_be_read_is_named(copy: Path) -> None:
    PushQueue("user/tiny")._add(Path(checkpoints_of(copy)[0]))
    record = copy / "push-queue" / "000001-step-000002" / "push.json"
    good = json.loads(record.read_text())
    for text in ("{", json.dumps(good | {"tags": 3}), json.dumps(good | {"version": 2})):
        record.write_text(text)
        with pytest.raises(HubError, match=r"is no push that can be finished|is of version 2"):
            pending_pushes(copy)


def test_wrong_settings_are_refused_before_training() -> None:
    with pytest.raises(HubError, match="'tiny' is not a Hub name"):
        PushQueue("tiny")
    with pytest.raises(HubError, match="is no name for a tag or branch"):
        PushQueue("user/tiny", tag="step {step}")
    with pytest.raises(HubError, match="is no name for a tag or branch"):
        PushQueue("user/tiny", branch="a b")
    with pytest.raises(ConfigError, match="license='MIT' is not an identifier"):
        PushQueue("user/tiny", license="MIT")
    with pytest.raises(ConfigError, match="wait_seconds=-1 is negative"):
        PushQueue("user/tiny", wait_seconds=-1)
    with pytest.raises(ConfigError, match="max_pending=1 is too few"):
        PushQueue("user/tiny", max_pending=1)


def test_a_push_made_while_the_queue_is_read_is_no_error(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = PushQueue("user/tiny")
    first, second = (queue._add(Path(checkpoint)) for checkpoint in checkpoints_of(copy)[:2])
    folder = copy / "push-queue"
    listed = sorted(folder.iterdir())
    _pending.drop_push(folder, first)  # by another thread, after the folder was listed
    monkeypatch.setattr(Path, "is_dir", lambda path: path == folder or path in listed)
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(listed))
    assert pending_pushes(copy) == [second]


def test_what_is_set_aside_is_never_in_the_way(hub: HubServer, client: HubClient, copy: Path) -> None:
    for _ in range(2):
        PushQueue("user/tiny")._add(Path(checkpoints_of(copy)[0]))
        (entry,) = (copy / "push-queue").glob("0*")
        (entry / "model" / "model.safetensors").unlink()
        (entry / "model" / "model.safetensors").write_bytes(b"x")
        assert do(client, "result = finish_pushes(out)", copy) == []
    assert len(list((copy / "push-queue").glob("damaged-*"))) == 2


def test_a_checkpoint_that_a_crash_kept_out_of_the_queue_follows_with_the_next(copy: Path) -> None:
    first, second, third = (Path(checkpoint) for checkpoint in checkpoints_of(copy))
    queue = PushQueue("user/tiny")
    assert queue._missed(third) == []  # of a run that was not pushed so far nothing is missed
    queue._add(first)
    assert queue._missed(third) == [second]
    (copy / "push-queue" / "pushed.jsonl").write_text('{"push": "000001-step-000004"}\n{"pu')
    shutil.rmtree(copy / "push-queue" / "000001-step-000002")
    assert PushQueue("user/tiny")._missed(third) == []
    (copy / "push-queue" / "pushed.jsonl").write_text('{"push": "000001-step-000002"}\n{"pu')
    assert PushQueue("user/tiny")._missed(third) == [second]


def test_every_tag_arrives_when_a_checkpoint_was_missed(hub: HubServer, client: HubClient, copy: Path) -> None:
    code = """
for index in (0, 2):
    with PushQueue("user/tiny") as queue:
        queue(Path(checkpoints[index]))
"""
    do(client, code, copy)
    assert tags_in_order(hub) == ["step-2", "step-4", "step-6"]


def test_half_made_pushes_of_a_process_that_died_go_after_a_day(copy: Path) -> None:
    PushQueue("user/tiny")._add(Path(checkpoints_of(copy)[0]))
    old, new = (copy / "push-queue" / f".new-{number}-1" for number in (1, 2))
    for folder in (old, new):
        folder.mkdir()
    os.utime(old, (time.time() - 90_000,) * 2)
    with lock(copy / "push-queue"):
        pass
    assert (old.exists(), new.exists()) == (False, True)


def test_a_run_that_was_moved_keeps_its_card(hub: HubServer, client: HubClient, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "before")
    PushQueue("user/tiny")._add(Path(checkpoints_of(tmp_path / "before")[2]))
    (tmp_path / "before").rename(tmp_path / "after")
    do(client, "finish_pushes(out)", tmp_path / "after")
    assert "| after 6 steps, the last |" in hub.repos["user/tiny"].files()["README.md"].decode()


def test_a_record_of_nonsense_costs_the_card_and_not_the_push(
    hub: HubServer, client: HubClient, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "tiny")
    with (tmp_path / "tiny" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "resume", "step": 1, "changes": 7}\n')
    PushQueue("user/tiny")._add(Path(checkpoints_of(tmp_path / "tiny")[2]))
    assert len(do(client, "result = finish_pushes(out)", tmp_path / "tiny")) == 1
